"""What the CUDA allocator itself says: peaks by phase, and a snapshot for PyTorch's memory viewer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SNAPSHOT_EVENTS = 200_000
"""Allocations kept in a snapshot; about half a kilobyte each."""


class Allocator:
    """Reads the CUDA allocator's peaks by phase; on a CPU it stays empty."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase: str | None = None

    def __call__(self, phase: str) -> None:
        """Begin a phase; `end` closes the last."""
        if self.place.type != "cuda":
            return
        if self._phase is not None:
            found = {
                "max_memory_allocated": torch.cuda.max_memory_allocated(self.place),
                "max_memory_reserved": torch.cuda.max_memory_reserved(self.place),
            }
            before = self.peaks.setdefault(self._phase, dict.fromkeys(found, 0))
            self.peaks[self._phase] = {name: max(value, before[name]) for name, value in found.items()}
        torch.cuda.reset_peak_memory_stats(self.place)
        self._phase = phase


@contextmanager
def snapshot(place: torch.device, path: Path | None) -> Iterator[None]:
    """Record every allocation inside the block and write them to `path`, for pytorch.org/memory_viz.

    Only the CUDA allocator keeps such a record: elsewhere, and where `path` is None, this does nothing.
    """
    if path is None or place.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
    try:
        yield
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
