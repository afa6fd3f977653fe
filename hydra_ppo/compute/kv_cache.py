"""A key-value cache whose columns are written in place, and whose rows can be repeated and dropped.

transformers' own DynamicCache makes every layer's keys and values anew for each token. Here they are views of storage with
room for more columns, which is made anew once in `COLUMNS` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils

from hydra_ppo.runtime.announce import allocating

COLUMNS = 64
"""Storage holds a multiple of this many columns, or as many as are ever needed."""

_Layer: Any = getattr(cache_utils, "DynamicLayer", object)
"""Since 4.54 a cache is a list of layers; before, it is two lists of tensors."""


def last_full(columns: int) -> int:
    """Return the most columns, `columns` or fewer, at which storage is full and the next column makes it anew."""
    return columns // COLUMNS * COLUMNS


class GrowingTensor:
    """Keys or values of one layer, (B, heads, S, D), that takes more columns.

    Args:
        limit: columns that will ever be needed.

    Memory: the storage; while it is made anew, the old one too.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.filled: Tensor | None = None  # (B, heads, S, D), a view of the storage
        self._storage: Tensor | None = None  # (B or more, heads, S or more, D)

    def append(self, columns: Tensor) -> Tensor:
        """Take columns (B, heads, T, D); return all (B, heads, S + T, D)."""
        filled = self.extend(columns.shape[2], columns)
        filled[:, :, filled.shape[2] - columns.shape[2] :].copy_(columns)
        return filled

    def extend(self, count: int, like: Tensor) -> Tensor:
        """Take `count` more columns, to be written; return all (B, heads, S + count, D).

        The first are of the shape and type of `like`.
        """
        start = 0 if self.filled is None else self.filled.shape[2]
        rows = len(like if self.filled is None else self.filled)
        end = start + count
        storage = self._storage
        if storage is None or end > storage.shape[2]:
            storage = self._move(rows, self._room(end), like)
        self.filled = storage[:rows, :, :end]
        return self.filled

    def keep(self, sources: Sequence[int], moved: Tensor, origins: Tensor) -> Tensor:
        """Let row i be the one that was row sources[i]; return all. Where no more rows are wanted than there are, in place.

        Args:
            sources: one row number for each row that is wanted.
            moved: (M,) all i with sources[i] != i.
            origins: (M,) sources[i] for these.
        """
        storage, filled = self._storage, self.filled
        assert storage is not None
        assert filled is not None
        rows, columns = len(sources), filled.shape[2]
        taken = filled.index_select(0, origins)
        if rows > len(storage):
            storage = self._move(min(rows, len(filled)), storage.shape[2], filled, rows)
        self.filled = storage[:rows, :, :columns]
        return self.filled.index_copy_(0, moved, taken)

    def _room(self, columns: int) -> int:
        return max(columns, min(self.limit, -(-columns // COLUMNS) * COLUMNS))

    def _move(self, rows: int, room: int, like: Tensor, more: int = 0) -> Tensor:
        """Make and return storage of `room` columns and copy the first `rows` rows to it."""
        storage = like.new_empty(max(rows, more), like.shape[1], room, like.shape[3])
        if self.filled is not None:
            storage[:rows, :, : self.filled.shape[2]] = self.filled[:rows]
        self._storage = storage
        return storage


class GrowingLayer(_Layer):
    """One layer of a `KVCache`; its keys and values are views of growing storage."""

    keys: Tensor  # transformers has None here until the first update
    values: Tensor

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.parts: tuple[GrowingTensor, ...] = (GrowingTensor(limit), GrowingTensor(limit))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self._begin(key_states)
        self.keys, self.values = (part.append(new) for part, new in zip(self.parts, (key_states, value_states), strict=True))
        return self.keys, self.values

    def _begin(self, like: Tensor) -> None:
        """Note what transformers notes of a layer when its first columns come."""
        self.is_initialized, self.dtype, self.device = True, like.dtype, like.device

    def keep(self, sources: Sequence[int], moved: Tensor, origins: Tensor) -> None:
        """See `GrowingTensor.keep`."""
        self.keys, self.values = (part.keep(sources, moved, origins) for part in self.parts)

    def extend(self, count: int) -> None:
        """Append that many columns, to be written."""
        keys, values = self.parts
        self.keys, self.values = keys.extend(count, self.keys), values.extend(count, self.values)

    def leap(self, count: int) -> None:
        """Append that many columns of zeros."""
        self.extend(count)
        for held in (self.keys, self.values):
            held[:, :, -count:].zero_()


class KVCache(DynamicCache):
    """transformers' cache for one generation batch. Sliding windows are left to the masks; every column is kept.

    Args:
        limit: columns that will ever be needed: those of the longest prompt and of all response tokens but the last.

    Memory: what is announced as "kv cache"; up to `COLUMNS` - 1 columns more than are filled, never more than `limit`; one
    layer's keys twice while they grow. Rows that were dropped are given back when their layer grows next.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        layers: Any = self.layers
        self.growing: list[GrowingLayer] = layers  # the same list, of what its items are
        self.growing[:] = [self._new_layer() for _ in layers]  # 4.54 and 4.55 begin with one

    def _new_layer(self) -> GrowingLayer:
        return GrowingLayer(self.limit)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        with allocating("kv cache"):
            while len(self.growing) <= layer_idx:
                self.growing.append(self._new_layer())
            return self.growing[layer_idx].update(key_states, value_states)

    def keep(self, sources: Sequence[int], device: torch.device) -> None:
        """Let row i be the one that was row sources[i]; rows may be repeated, left out and moved. Copies only moved rows."""
        moves = [(row, source) for row, source in enumerate(sources) if row != source]
        with allocating("kv cache"):
            moved, origins = torch.tensor(moves, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
            for layer in self.growing:
                layer.keep(sources, moved, origins)

    def extend(self, count: int) -> None:
        """Append that many columns to every layer, to be written."""
        with allocating("kv cache"):
            for layer in self.growing:
                layer.extend(count)

    def leap(self, count: int) -> None:
        """Append that many columns of zeros."""
        with allocating("kv cache"):
            for layer in self.growing:
                layer.leap(count)


class ConcatenatingCache(DynamicCache):
    """transformers' own cache, for versions whose caches have no layers."""

    def __init__(self, limit: int) -> None:
        super().__init__()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with allocating("kv cache"):
            return super().update(*args, **kwargs)

    def keep(self, sources: Sequence[int], device: torch.device) -> None:
        """Let row i be the one that was row sources[i]."""
        with allocating("kv cache"):
            self.batch_select_indices(torch.tensor(sources, device=device))


def new_cache(limit: int) -> KVCache | ConcatenatingCache:
    """Return an empty cache for up to `limit` columns."""
    return ConcatenatingCache(limit) if _Layer is object else KVCache(limit)
