"""A matrix of one row a word, held in 8 or 4 bits: embeddings and output heads, which are read by rows.

Groups of `GROUP` neighbouring numbers of a row share a scale, so that any rows can be had without the others: the rows of some
tokens, or a block of the vocabulary. The whole matrix is never there in the compute type.

int8: as `int8` rounds a group. nf4: bitsandbytes' NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, section 3).

How far log-probs move, mean |difference| in nats: docs/notes.md, "Embeddings in 8 and 4 bits".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hydra_ppo.compute.int8 import dequantise, quantise
from hydra_ppo.runtime.announce import allocating

RowsKind = Literal["int8", "nf4"]

GROUP = 64
"""Numbers that share a scale. A row of SmolLM2-135M, 576 numbers, with one scale in int8: 0.042 nats; with one in 64: 0.024."""

BLOCK_BYTES = 32 * 2**20
"""What a block of rows may take in the compute type while it is quantised, and where a whole head is needed for few states."""


class QuantizedRows(nn.Module):
    """A matrix (V, H) in 8 or 4 bits.

    Where rows are wanted it can stand for a frozen weight: it has shape, dtype and device, and indexing it by tokens or by a
    slice gives rows in the compute type.

    Args:
        kind: int8 or nf4.
        shape: (V, H), H a multiple of `GROUP`.
        dtype: compute type, that of what comes out; the scales are of it, too.
        device: where it lies.

    Memory: V x H bytes (nf4: half of it) and V x H / 64 scales.
    """

    values: Tensor  # int8 (V, H), or two numbers a byte (V, H / 2)
    scales: Tensor  # (V, H / GROUP)

    def __init__(self, kind: RowsKind, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert kind in get_args(RowsKind)
        count, width = shape
        self.kind, self.dtype = kind, dtype
        held = (torch.int8, width) if kind == "int8" else (torch.uint8, width // 2)
        with allocating("base weights"):
            self.register_buffer("values", torch.empty(count, held[1], dtype=held[0], device=device))
            self.register_buffer("scales", torch.empty(count, width // GROUP, dtype=dtype, device=device))

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, kind: RowsKind, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
        """Quantise a weight (V, H), which may lie elsewhere, block by block.

        Memory: the result, and two blocks of rows in fp32.
        """
        rows = cls(kind, (weight.shape[0], weight.shape[1]), dtype, device)
        for block in rows.blocks(BLOCK_BYTES):
            rows.put(block, weight[block])
        return rows

    @torch.no_grad()
    def put(self, block: slice, weight: Tensor) -> None:
        """Set the rows of `block` to what (n, H) rounds to."""
        with allocating("dequantised weights"):
            wide = weight.to(self.scales.device, torch.float32).unflatten(1, (-1, GROUP))  # (n, groups, GROUP)
            if self.kind == "int8":
                codes, found = quantise(wide, self.dtype)
                values, scales = codes.flatten(1), found[..., 0]
            else:
                scales = wide.abs().amax(dim=-1).to(self.dtype)
                packed, _ = _bitsandbytes().quantize_4bit(wide.contiguous(), blocksize=GROUP, quant_type="nf4")
                values = packed.view(len(wide), -1)
            self.values[block], self.scales[block] = values, scales

    # -- what a weight has -----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """(V, H)."""
        return torch.Size((len(self.scales), self.scales.shape[1] * GROUP))

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def data(self) -> Tensor:
        """A tensor by which a simulation, or the meta device, is known."""
        return self.values

    requires_grad = False

    def is_floating_point(self) -> bool:
        """Say yes: what comes out is."""
        return True

    def isfinite(self) -> Tensor:
        """Return whether the numbers are finite, group by group."""
        return self.scales.isfinite()

    def __len__(self) -> int:
        return len(self.scales)

    @torch.no_grad()
    def __getitem__(self, index: Any) -> Tensor:
        """Return the rows of tokens (...), of one token or of a slice: (..., H) in the compute type."""
        values, scales = self.values[index], self.scales[index]
        if self.kind == "int8":
            return dequantise(values.unflatten(-1, (-1, GROUP)), scales[..., None]).flatten(-2)
        shape = (*values.shape[:-1], values.shape[-1] * 2)
        bnb = _bitsandbytes()
        state = bnb.QuantState(
            absmax=scales.reshape(-1).float(),
            shape=torch.Size(shape),
            code=bnb.get_4bit_type("nf4", device=str(values.device)),
            blocksize=GROUP,
            quant_type="nf4",
            dtype=self.dtype,
        )
        found: Tensor = bnb.dequantize_4bit(values.reshape(-1, 1), state)
        return found.view(shape)

    # -- blocks ----------------------------------------------------------------------------------------------------------

    def blocks(self, size: int) -> Iterator[slice]:
        """Yield slices of rows that take `size` bytes in the compute type, or a row each."""
        count = self.rows_of(size)
        for start in range(0, len(self), count):
            yield slice(start, min(start + count, len(self)))

    def rows_of(self, size: int) -> int:
        """Return how many rows take `size` bytes in the compute type; at least one."""
        return max(1, size // (self.shape[1] * self.dtype.itemsize))


def _bitsandbytes() -> Any:
    import bitsandbytes.functional as bnb

    return bnb
