"""A key-value cache in int8: one scale a token and key-value head, for keys as they are rotated and for values.

x is held as round(x / s) and s = max |x| / 127, the largest of the D entries of one token in one head. s is of the compute
type, and x is divided by s as it is held, so that rounding s costs nothing: no entry is off by more than half of it.

Keys have a few entries that are much larger than the others, in all tokens, and would leave those few codes. So sums and
differences of them are held, k H, with entries of H that are 1, -1 or 0 and H H^T = g 1. As q k^T = (q H) (k H)^T / g, it is
enough to do the same with the query. Source: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_ppo.compute.int8 import dequantise, quantise
from hydra_ppo.compute.kv_cache import ConcatenatingCache, GrowingLayer, GrowingTensor, KVCache, new_cache
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.runtime.announce import allocating

PIECE = 2**22
"""Entries that are rounded at once, where a row of the batch has no more: 16 MiB in fp32, three times for the moment."""


class Mixer(NamedTuple):
    """Sums and differences of the entries of a key.

    Attributes:
        matrix: (D, D) fp32, of 1, -1 and 0; symmetric.
        gain: what its square is times the identity.
    """

    matrix: Tensor
    gain: int

    def mix(self, x: Tensor) -> Tensor:
        """Return x (..., D) mixed, in fp32."""
        return x.float() @ self.matrix


def mixer(size: int, device: torch.device) -> Mixer:
    """Return the mixer of keys of that size: for D = 2^a m with odd m, each of the 2^a entries m apart with one another.

    Memory: D x D fp32.
    """
    gain = size & -size
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < gain:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return Mixer(torch.kron(matrix, torch.eye(size // gain, device=device)), gain)


class Int8Tensor:
    """Keys or values of one layer, (B, heads, S, D), that takes more columns; see `GrowingTensor`.

    Memory: B x heads x S x (D + the bytes of a scale), with room for more columns.
    """

    def __init__(self, limit: int) -> None:
        self.codes, self.scales = GrowingTensor(limit), GrowingTensor(limit)
        self.mixer: Mixer | None = None

    def append(self, columns: Tensor) -> None:
        """Take columns (B, heads, T, D) and round them, a few rows of the batch at a time."""
        rows, heads, count, size = columns.shape
        codes = self.codes.extend(count, columns.new_empty(rows, heads, 0, size, dtype=torch.int8))
        scales = self.scales.extend(count, columns.new_empty(rows, heads, 0, 1))
        piece = max(1, PIECE // columns[0].numel())
        for start in range(0, rows, piece):
            entering = columns[start : start + piece]
            rounded = quantise(entering if self.mixer is None else self.mixer.mix(entering), columns.dtype)
            for part, new in zip((codes, scales), rounded, strict=True):
                part[start : start + piece, :, -count:].copy_(new)

    @property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Codes (B, heads, S, D) and scales (B, heads, S, 1), to be read or written in place; of keys, mixed."""
        assert self.codes.filled is not None
        assert self.scales.filled is not None
        return self.codes.filled, self.scales.filled

    def whole(self, mixed: bool = False) -> Tensor:
        """Return all (B, heads, S, D) in the compute type; `mixed` leaves keys as they are held.

        Memory: the result; for keys that are not to be mixed twice that, for the moment.
        """
        codes, scales = self.filled
        with allocating("activations"):  # no part of what is kept
            if self.mixer is None or mixed:
                return dequantise(codes, scales)
            own = codes.to(scales.dtype) @ self.mixer.matrix.to(scales.dtype)  # whole numbers: exact, up to the result
            return own.mul_(scales / self.mixer.gain)


class Int8Layer(GrowingLayer):
    """One layer of an `Int8Cache`. It has no `keys` and `values`: who looks for them there finds None and not codes."""

    def __init__(self, limit: int, mixers: dict[int, Mixer]) -> None:
        super().__init__(limit)
        self.held = Int8Tensor(limit), Int8Tensor(limit)
        self.parts = tuple(part for half in self.held for part in (half.codes, half.scales))
        self.mixers = mixers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round and keep new columns (B, heads, T, D); return what their attention sees, (B, heads, S + T, D).

        Columns that come together, as those of a prompt do, see one another as they are; what came before is rounded, and so is
        a single column, as the attention of later ones will see it.

        Memory: this layer's keys and values in the compute type, until their attention is done.
        """
        first = self.get_seq_length() == 0
        if first:
            self._begin(key_states)
            size = key_states.shape[-1]
            if size not in self.mixers:
                with allocating("activations"):
                    self.mixers[size] = mixer(size, key_states.device)
            self.held[0].mixer = self.mixers[size]
        found = []
        for half, new in zip(self.held, (key_states, value_states), strict=True):
            half.append(new)
            if first:
                found.append(new)
                continue
            seen, count = half.whole(), new.shape[2]
            if count > 1:
                seen[:, :, -count:].copy_(new)
            found.append(seen)
        return found[0], found[1]

    def write(self, key: Tensor, value: Tensor) -> None:
        """Round key and value (B, heads, D) of one token a row into the last column, which is there already."""
        keys = self.held[0]
        assert keys.mixer is not None
        entering = torch.stack([keys.mixer.mix(key), value.float()])
        for half, codes, scales in zip(self.held, *quantise(entering, key.dtype), strict=True):
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
    runs, keys and values in the compute type; one `Mixer` for each size of keys.
    """

    def __init__(self, limit: int) -> None:
        self.mixers: dict[int, Mixer] = {}
        super().__init__(limit)

    def _new_layer(self) -> Int8Layer:
        return Int8Layer(self.limit, self.mixers)


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
