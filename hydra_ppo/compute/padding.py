"""Moves padding to the right, where causal attention needs no mask: no (B, 1, T, T) tensor, and the fast kernels apply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RightPadded(NamedTuple):
    """Rows whose tokens stand first and whose padding stands last.

    Attributes:
        input_ids: (B, T).
        position_ids: (B, T), or None where all rows count from 0.
        lengths: (B,) tokens of each row.
        columns: (B, T) where each column of the caller's layout went.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    lengths: Tensor
    columns: Tensor

    def restore(self, hidden: Tensor) -> Tensor:
        """Return (B, T, H) hidden states in the caller's layout; what stands at padding means nothing."""
        return hidden.gather(1, self.columns[..., None].expand_as(hidden))


def pad_on_the_right(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> RightPadded | None:
    """Move the tokens that `attention_mask` keeps to the front of their rows, each with its own position.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), nonzero where a token counts.
        position_ids: (B, T); None counts columns, padding included, as most models do.

    Returns:
        None where positions would have gaps (padding between tokens, counted): such rows need a mask.
    """
    kept = attention_mask.bool()
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)  # (B, T)
    count = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = (count.expand_as(input_ids) if position_ids is None else position_ids.expand_as(input_ids)).gather(1, order)
    lengths = kept.sum(dim=1)
    gap = (positions.diff(dim=1) != 1) & (count[1:] < lengths[:, None])
    gaps, from_zero = torch.stack([gap.any(), (positions[:, 0] == 0).all()]).tolist()
    if gaps:
        return None
    compact = None if from_zero else positions[:, :1] + count
    return RightPadded(input_ids.gather(1, order), compact, lengths, order.argsort(dim=1))
