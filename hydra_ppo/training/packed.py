"""Tensors of several shapes and types laid out in one run of bytes, so that one copy carries all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes that each tensor's place is a multiple of: what kernels that take several numbers at a time ask of an address."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: first byte and bytes, and how they are read."""

    first: int
    bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Layout:
    """Places for tensors, one after the other.

    Args:
        like: shapes, strides and types; dense, as fresh tensors are.

    Attributes:
        bytes: of the whole run.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.places: list[Place] = []
        self.bytes = 0
        for tensor in like:
            size = tensor.numel() * tensor.element_size()
            self.places.append(Place(self.bytes, size, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype))
            self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, run: Tensor) -> list[Tensor]:
        """Return the tensors that lie in a run of bytes (uint8, at least `bytes` of them); they share its memory."""
        return [
            run[place.first : place.first + place.bytes].view(place.dtype).as_strided(place.shape, place.stride)
            for place in self.places
        ]
