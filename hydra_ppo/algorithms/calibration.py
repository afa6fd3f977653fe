"""How well the probabilities that a reward model stands for fit what is found."""

from __future__ import annotations

import torch
from torch import Tensor


def share_right(margins: Tensor) -> Tensor:
    """Return how far each pair is ranked as its label says, (N,): 1, or 0, or 1/2 where both answers score the same.

    So a head of zeros, which knows nothing, is at chance.

    Args:
        margins: (N,) score of the chosen answer minus that of the rejected one.
    """
    return 0.5 * ((margins > 0).float() + (margins >= 0).float())


def expected_calibration_error(margins: Tensor, bins: int = 10) -> Tensor:
    """Measure how far the stated probabilities of preferences are from how often they hold.

    With p = sigmoid(|margin|), the probability that a Bradley-Terry model gives its own verdict, and hit as of `share_right`,
    pairs are sorted into equal bins of p over [0.5, 1]: ECE = sum over bins of n_b / n * |mean hit - mean p|.

    Source: Peng et al. 2023 (arXiv 2309.10202), section 4, who print it in percent; this is a share of 1.

    Args:
        margins: (N,) score of the chosen answer minus that of the rejected one; 0 is half a hit.
        bins: how many.

    Returns:
        (), from 0 (calibrated) to 1. NaN where there is no pair.
    """
    p = margins.double().abs().sigmoid()
    hits = share_right(margins).double()
    index = ((p - 0.5) * 2 * bins).long().clamp(0, bins - 1)  # NaN goes anywhere, and stays NaN
    gaps = torch.zeros(bins, dtype=p.dtype, device=p.device).index_add(0, index, hits - p)
    return gaps.abs().sum() / len(margins)
