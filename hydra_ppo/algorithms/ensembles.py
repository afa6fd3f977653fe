"""What k reward heads say together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "minimum", "variance", "lcb"]


def combine_members(members: Tensor, aggregate: Aggregate, coef: float) -> Tensor:
    """Return one score per response from what k members say of it.

    `mean`; `minimum`, which is WCO, and `variance`, mean - coef * variance, which is UWO, of Coste et al. 2023 (arXiv
    2310.02743); `lcb`, mean - coef * standard deviation (arXiv 2401.16635). Variance and standard
    deviation are unbiased, divided by k - 1. Members are taken as they are, neither shifted nor scaled.

    Args:
        members: (B, k), floating point.
        aggregate: how they are combined.
        coef: factor of the penalty; not read by `mean` and `minimum`.

    Returns:
        (B,), differentiable but for `lcb` where all members agree.

    Raises:
        ValueError: where there are no members, or fewer than two have a spread.

    Memory: one more (B, k).
    """
    if members.dim() != 2 or members.shape[1] < 1:
        raise ValueError(f"members={tuple(members.shape)} is not (B, k) with k of 1 or more; give a column for each member.")
    if aggregate == "mean":
        return members.mean(dim=1)
    if aggregate == "minimum":
        return members.min(dim=1).values
    if aggregate not in ("variance", "lcb"):
        raise ValueError(f"aggregate={aggregate!r} is not mean, minimum, variance or lcb; choose one of them.")
    if members.shape[1] < 2:
        raise ValueError(f"aggregate={aggregate!r} needs two members or more, there is one; use mean.")
    spread = members.var(dim=1) if aggregate == "variance" else members.std(dim=1)
    return members.mean(dim=1) - coef * spread


def spread_of(members: Tensor) -> Tensor:
    """Return (B,) the unbiased standard deviation over members (B, k); zeros where there is one member."""
    return members.std(dim=1) if members.shape[1] > 1 else torch.zeros_like(members[:, 0])
