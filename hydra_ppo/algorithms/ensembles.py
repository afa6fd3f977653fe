"""What several reward models say together of one response, and how far apart they are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "minimum", "variance", "lcb"]


def combine_members(members: Tensor, aggregate: Aggregate, coef: float = 0.0) -> Tensor:
    """Make one score of what the members of an ensemble say.

    `mean`; `minimum`, the worst case (WCO), and `variance`, mean - coef * variance (UWO), of Coste et al. 2023 (arXiv
    2310.02743), section 3.2; `lcb`, mean - coef * standard deviation, of Zhang et al. 2024 (arXiv 2401.16635). Variance and
    deviation are the unbiased ones, which divide by k - 1; of one member both are 0.

    Args:
        members: (B, k).
        coef: of the penalty; `mean` and `minimum` have none.

    Returns:
        (B,).

    Raises:
        ValueError: for another aggregate.
    """
    if aggregate == "minimum":
        return members.amin(dim=1)
    mean = members.mean(dim=1)
    if aggregate == "mean":
        return mean
    if aggregate == "variance":
        return mean - coef * spread(members) ** 2
    if aggregate == "lcb":
        return mean - coef * spread(members)
    raise ValueError(f"aggregate={aggregate!r} is none; choose mean, minimum, variance or lcb.")


def spread(members: Tensor) -> Tensor:
    """Return (B,), the unbiased standard deviation over the members (B, k) of each response; 0 where there is one member."""
    if members.shape[1] == 1:
        return torch.zeros_like(members[:, 0])
    return members.std(dim=1)


def disagreements(members: Tensor) -> Tensor:
    """Say of each response and the one after it whether the members differ on which of the two is better.

    Args:
        members: (B, k). After the last response comes the first.

    Returns:
        (B,) bool: whether one member ranks the response above the next one and another below it. A tie is on nobody's side.
    """
    apart = members - members.roll(-1, dims=0)  # (B, k)
    return (apart > 0).any(dim=1) & (apart < 0).any(dim=1)
