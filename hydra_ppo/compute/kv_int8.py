"""A key-value cache in int8: one scale a token and key-value head, for keys as they are rotated and for values.

x is held as round(x / s) and s = max |x| / 127, the largest of the D entries of one token in one head. s is of the compute
type, and x is divided by s as it is held, so that rounding s costs nothing: no entry is off by more than half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compute.kv_cache import ConcatenatingCache, GrowingLayer, GrowingTensor, KVCache, new_cache
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.runtime.announce import allocating

LEVELS = 127
"""The largest code; -128 is not used, so that x and -x have codes alike."""

SMALLEST = {torch.float16: 2.0**-16}
"""The smallest scale where it is not the type's smallest normal number. fp16 has steps of 2^-24 there: half of one is 0.2% of
this scale, and a quotient of 127.25 is still a code of 127."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (..., D) int8 and scales (..., 1), in the type of `x` (..., D); one entry not finite, and no scale is.

    Memory: x once more in fp32, for the moment.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    scales = largest.div_(LEVELS).clamp_(min=SMALLEST.get(x.dtype, torch.finfo(x.dtype).tiny))
    return torch.div(x, scales.float()).round_().to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """Return (..., D) in the type of the scales (..., 1): entries are off by half a scale at most, and by that type's rounding.

    Memory: the result.
    """
    if codes.device.type == "cuda":
        return codes * scales  # one kernel; on a CPU it takes up to twice as long as a cast and a product in place
    return codes.to(scales.dtype).mul_(scales)


class Int8Tensor:
    """Keys or values of one layer, (B, heads, S, D), that takes more columns; see `GrowingTensor`.

    Memory: B x heads x S x (D + the bytes of a scale), with room for more columns.
    """

    def __init__(self, limit: int) -> None:
        self.codes, self.scales = GrowingTensor(limit), GrowingTensor(limit)

    def append(self, columns: Tensor) -> None:
        """Take columns (B, heads, T, D) and round them."""
        codes, scales = quantise(columns)
        self.codes.append(codes)
        self.scales.append(scales)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Codes (B, heads, S, D) and scales (B, heads, S, 1), to be read or written in place."""
        assert self.codes.filled is not None
        assert self.scales.filled is not None
        return self.codes.filled, self.scales.filled

    def whole(self) -> Tensor:
        """Return all (B, heads, S, D) in the compute type."""
        with allocating("activations"):  # no part of what is kept
            return dequantise(*self.filled)


class Int8Layer(GrowingLayer):
    """One layer of an `Int8Cache`. It has no `keys` and `values`: who looks for them there finds None and not codes."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.held = Int8Tensor(limit), Int8Tensor(limit)
        self.parts = tuple(part for half in self.held for part in (half.codes, half.scales))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round and keep new columns (B, heads, T, D); return what their attention sees, (B, heads, S + T, D).

        Columns that come together, as those of a prompt do, see one another as they are; what came before is rounded, and so is
        a single column, as the attention of later ones will see it.

        Memory: this layer's keys and values in the compute type, until their attention is done.
        """
        if self.get_seq_length() == 0:
            self._begin(key_states)
            for half, new in zip(self.held, (key_states, value_states), strict=True):
                half.append(new)
            return key_states, value_states
        found = []
        for half, new in zip(self.held, (key_states, value_states), strict=True):
            half.append(new)
            seen, count = half.whole(), new.shape[2]
            if count > 1:
                seen[:, :, -count:].copy_(new)
            found.append(seen)
        return found[0], found[1]

    def write(self, entering: Tensor) -> None:
        """Round the keys and values of one token a row, (2, B, heads, D), into the last column, which is there already."""
        for half, codes, scales in zip(self.held, *quantise(entering), strict=True):
            for part, new in zip(half.filled, (codes, scales), strict=True):
                part[:, :, -1].copy_(new)

    def extend(self, count: int) -> None:
        for part in self.parts:
            assert part.filled is not None
            part.extend(count, part.filled)

    def leap(self, count: int) -> None:
        self.extend(count)
        for part in self.parts:
            assert part.filled is not None
            part.filled[:, :, -count:].zero_()

    def keep(self, sources: Sequence[int], moved: Tensor, origins: Tensor) -> None:
        for part in self.parts:
            part.keep(sources, moved, origins)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        filled = self.parts[0].filled
        return 0 if filled is None else filled.shape[2]


class Int8Cache(KVCache):
    """A `KVCache` that holds rows x columns x layers x 2 x heads x (D + a scale) bytes.

    Memory: that, announced as "kv cache", with the room that `KVCache` speaks of; of one layer at a time, while its attention
    runs, keys and values in the compute type.
    """

    layer_type = Int8Layer


def cache_for(kind: str, limit: int) -> KVCache | ConcatenatingCache:
    """Return an empty cache for up to `limit` columns.

    Args:
        kind: auto, exact in the compute type; or int8.

    Raises:
        UnsupportedModelError: for int8, on a transformers whose caches have no layers.
    """
    if kind == "auto":
        return new_cache(limit)
    check_layers()
    return Int8Cache(limit)


def check_layers() -> None:
    """Refuse int8 where there is no layer that could be dequantised by itself.

    Raises:
        UnsupportedModelError: on a transformers before 4.54.
    """
    if isinstance(new_cache(1), ConcatenatingCache):
        raise UnsupportedModelError(
            "rollout.kv_cache='int8' needs caches that are made of layers, which transformers has since 4.54; install a newer "
            "one, or use rollout.kv_cache=auto."
        )
