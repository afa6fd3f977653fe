"""Draws tokens from logits: one random number a row, looked up in the cumulative distribution.

`torch.multinomial` draws a random number for every entry of the vocabulary instead, which on a CPU takes longer than the
output head. The vocabulary is summed in blocks; cumulative sums, in float64, are taken over the blocks and over the one
block that was hit. The same weights give the log-prob, so that there is one exponential a logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Entries of the vocabulary in one block. A draw sums V / BLOCK numbers and then BLOCK; both are small about here."""


class Drawn(NamedTuple):
    """Tokens (B,) and their log-probs (B,) in nats, fp32; NaN where the logits held NaN or +inf."""

    tokens: Tensor
    logprobs: Tensor


def draw(logits: Tensor, uniform: Tensor, keep: Callable[[Tensor], Tensor] | None = None, never: Tensor | None = None) -> Drawn:
    """Draw a token of each row from softmax(logits). Waits for no device.

    Args:
        logits: (B, V) fp32, overwritten.
        uniform: (B,) float64 in [0, 1); the same number draws the same token.
        keep: takes logits and returns those to draw from in a tensor of their own, (B, V), -inf where a token must not be
            drawn. Log-probs stay those of the whole distribution.
        never: (N,) tokens that are not drawn either.

    Returns:
        Tokens, never one of probability 0, and their log-probs.
    """
    # Before `keep`: the most likely token may be one that is never drawn, and top-k would keep that one alone.
    kept = None if keep is None else keep(logits if never is None else logits.index_fill(1, never, -torch.inf))
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()  # in (0, 1], the largest is 1
    total = weights.sum(dim=-1)
    drawn_from = weights if kept is None else kept.sub_(kept.amax(dim=-1, keepdim=True)).exp_()
    if never is not None:
        # What is chosen has a weight above 0, so the same tensor still says its log-prob.
        drawn_from.index_fill_(1, never, 0.0)
    tokens = invert(drawn_from, uniform)
    chosen = weights.gather(1, tokens[:, None])[:, 0]
    return Drawn(tokens, chosen.log() - total.log())


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return (B,) the column where the cumulative weight passes the share `uniform` of the row's total.

    Args:
        weights: (B, V), not negative, with a sum above 0. Rows with NaN get some column.
        uniform: (B,) float64 in [0, 1).
    """
    size = weights.shape[1]
    whole = size // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)  # (B, V // BLOCK)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    block, share = _passed(sums, uniform)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)  # (B, BLOCK)
    inside = weights.gather(1, columns.clamp(max=size - 1)).masked_fill_(columns >= size, 0.0)
    place, _ = _passed(inside, share)
    return (block * BLOCK + place).clamp_(max=size - 1)


def _passed(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B,) the column that `invert` looks for, and the share of that column's own weight that is left over."""
    upto = weights.double().cumsum(dim=1)  # (B, N)
    total = upto[:, -1]
    # Below the total also where the product is rounded up; then the first sum above it belongs to a weight above 0.
    target = torch.minimum(uniform.clamp(min=0.0) * total, torch.nextafter(total, torch.zeros_like(total)))
    column = torch.searchsorted(upto, target[:, None], right=True).clamp_(max=weights.shape[1] - 1)  # (B, 1)
    width = weights.gather(1, column).double()
    share = (target[:, None] - upto.gather(1, column) + width) / width
    return column[:, 0], share[:, 0]
