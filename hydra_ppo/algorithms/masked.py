"""Means and whitening over the entries that count."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Average the entries of `x` that count.

    Args:
        x: any shape.
        mask: bool, the shape of `x`.
        count: () divisor; the number of True entries when None. Micro-batches pass the count of the whole
            minibatch, so that their sums add up to the minibatch's mean exactly.

    Returns:
        () mean; 0 where nothing counts.
    """
    count = mask.sum() if count is None else count
    return x.masked_fill(~mask, 0.0).sum() / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the entries that count to variance 1, and to mean 0 when `shift_mean`; zero elsewhere.

    Args:
        x: (B, R).
        mask: (B, R) bool.
        shift_mean: True gives mean 0; False keeps the mean that `x` had.
        eps: added to the variance.

    Returns:
        (B, R).
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)
