"""Rows of different lengths laid end to end, so that no padding is computed.

A pass over (B, T) rows padded on the right multiplies padding like any token. Laid end to end they are one row of N tokens,
N the sum of their lengths, and only attention has to know where each begins: flash-attention has a kernel for that
(variable-length attention), and on a CPU one call of scaled_dot_product_attention per length does the same. Each token
keeps its own position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hydra_ppo.compat import register_attention
from hydra_ppo.compute import short_attention
from hydra_ppo.compute.flash import FLASH

BY_LENGTH = "hydra_ppo_by_length"
"""Name of the attention of this module among transformers' attention functions."""

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt"})
"""Model types whose packed passes are tested against padded ones; another one may do more with a mask or a position."""


class Packing:
    """Where the tokens of rows (B, T), padded on the right, lie when they stand end to end.

    Args:
        lengths: tokens of each row, at least 1.
        width: T.

    Attributes:
        index: (N,) places in the flattened rows.
        starts: (B,) place of each row's first token among the N.
        last: (B,) column of each row's last token.
    """

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.width = width
        columns = [torch.arange(length) for length in self.lengths]
        self.index = torch.cat([row * width + c for row, c in enumerate(columns)]).to(device)
        self.positions = torch.cat(columns)[None].to(device)  # (1, N)
        counts = torch.tensor(self.lengths)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # (B + 1,)
        self.starts, self.last = ends[:-1].to(device), (counts - 1).to(device)
        self._ends = ends.to(torch.int32).to(device)

    def pack(self, rows: Tensor) -> Tensor:
        """Return (1, N, ...) of (B, T, ...)."""
        return rows.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return (B, T, ...) of (1, N, ...), zeros where padding is."""
        rows = packed.new_zeros(len(self.lengths) * self.width, *packed.shape[2:])
        return rows.index_copy(0, self.index, packed[0]).unflatten(0, (len(self.lengths), self.width))

    def options(self, attention: str) -> dict[str, Any]:
        """Return what a Hugging Face backbone with this attention is to be called with beside the packed tokens."""
        if attention == BY_LENGTH:
            return {"position_ids": self.positions, "row_lengths": self.lengths}
        longest = max(self.lengths)
        return {
            "position_ids": self.positions,
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self._ends),
            **dict.fromkeys(("max_length_q", "max_length_k"), longest),
        }


class States(NamedTuple):
    """Final hidden states of rows: (B, T, H), or (1, N, H) where they were packed."""

    hidden: Tensor
    packing: Packing | None = None

    def at(self, columns: Tensor) -> Tensor:
        """Return (B, R, H), those at columns (B, R) of each of the leading B rows; beyond a row's end, its last one."""
        rows, width = columns.shape
        if self.packing is None:
            return self.hidden[:rows].gather(1, columns[..., None].expand(-1, -1, self.hidden.shape[-1]))
        places = self.packing.starts[:rows, None] + columns.minimum(self.packing.last[:rows, None])
        return self.hidden[0].index_select(0, places.flatten()).unflatten(0, (rows, width))


def packing_attention(config: PretrainedConfig, device: torch.device) -> str | None:
    """Return the attention that packed rows go through; None where they have to stay padded."""
    if config.model_type not in FAMILIES or not register_attention(BY_LENGTH, attend_by_length):
        return None
    if device.type == "cpu":
        return BY_LENGTH
    return config._attn_implementation if config._attn_implementation in FLASH else None


def worth_packing(lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether packed rows cost less than rows padded to `width`: there is padding, or attention is faster by length."""
    return sum(lengths) < len(lengths) * width or short_attention.wins(dtype, device, width)


@contextmanager
def attention_of(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Let the layers attend with the attention function `name` inside the block."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_by_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_lengths: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each of several rows that stand end to end, causally.

    Args:
        query: (1, heads, N, D); key, value: (1, key-value heads, N, D).
        attention_mask: None.
        sliding_window: tokens that each may see, itself included; None is all before it.
        row_lengths: tokens of each row, N in all.

    Returns:
        (1, N, heads, D), and None for the weights. Neighbours of one length share a call.

    Memory: for rows longer than a sliding window, one mask (T, T).
    """
    assert attention_mask is None
    assert sum(row_lengths) == query.shape[2]
    found, start = [], 0
    for length, group in groupby(row_lengths):
        rows = len(list(group))
        here = slice(start, start + rows * length)
        q, k, v = (part[0, :, here].unflatten(1, (rows, length)).transpose(0, 1) for part in (query, key, value))
        mask = _window(length, sliding_window, q.device) if sliding_window is not None and length > sliding_window else None
        if mask is None and short_attention.wins(q.dtype, q.device, length):
            out = short_attention.attend(q, k, v, scaling)  # (rows, heads, length, D)
        else:
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
            )
        found.append(out.transpose(1, 2).flatten(0, 1))  # (rows * length, heads, D)
        start += rows * length
    return torch.cat(found)[None], None


def _window(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)
