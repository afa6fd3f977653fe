"""Which pair to have labelled next: the one of which a one-pass head knows least, then the next, as if the first were known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_ppo.rewards.one_pass import quadratic


@dataclass(frozen=True)
class Pick:
    """A pair to label.

    Attributes:
        row: its number among the candidates.
        uncertainty: sqrt(z.P z), P narrowed by the picks before it.
        p: probability that the first answer is the better one, as the head has it.
    """

    row: int
    uncertainty: float
    p: float


def pick_next(z: Tensor, theta: Tensor, inverse: Tensor, count: int) -> list[Pick]:
    """Return the pairs to label, the most uncertain first.

    The active query of arXiv 2502.07193, argmax z.P z, for many queries at once: after each pick P is narrowed by
    p (1 - p) z z^T, which is what its label will do whichever it is, so that of near-copies one is picked. By Sherman-Morrison
    that is one product of all candidates with a vector: with u = P z* and c = w / (1 + w z*.u), every z.P z falls by c (z.u)^2.

    Args:
        z: (N, d) features of the first answer less those of the second.
        theta, inverse: (d,) and (d, d) of a one-pass head.
        count: how many; all where there are fewer.

    Memory: z in fp64, and one more number per candidate.
    """
    z, theta, inverse = z.double(), theta.double(), inverse.double().clone()
    p = torch.sigmoid(z @ theta)  # (N,)
    left = quadratic(z, inverse)
    picks: list[Pick] = []
    for _ in range(min(count, len(z))):
        row = int(left.argmax())
        picks.append(Pick(row, max(float(left[row]), 0.0) ** 0.5, float(p[row])))
        towards = inverse @ z[row]
        weight = float(p[row] * (1 - p[row]))
        factor = weight / (1 + weight * float(z[row] @ towards))
        left = left - factor * (z @ towards) ** 2
        inverse.addr_(towards, towards, alpha=-factor)
        left[[pick.row for pick in picks]] = -torch.inf
    return picks
