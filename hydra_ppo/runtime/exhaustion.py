"""Goes on after memory ran out: halves what is computed at once, and does the same work again."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from hydra_ppo.errors import HydraError, OutOfMemory

T = TypeVar("T")

_ASKED = re.compile(r"(?:[Tt]ried to allocate|allocate memory: you tried to allocate) ([\d.]+) ?(bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_TEXTS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Limits:
    """How much is computed at once, and has fitted so far.

    Args:
        sizes: by setting, such as `microbatch_size`; rows.
        device: whose memory it is.
        note: takes a line on every event.

    Attributes:
        sizes: as they are now; halving lasts for the run.
        events: times that memory ran out.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device, note: Callable[[str], None] = lambda text: None) -> None:
        self.sizes = dict(sizes)
        self.device = device
        self.note = note
        self.events = 0

    def fit(
        self, setting: str, where: str, attempt: Callable[[int], T], *, most: int, undo: Callable[[], object] = lambda: None
    ) -> T:
        """Return `attempt(size)`; where memory runs out, undo and try again with half the size, which stays.

        Args:
            setting: whose size it is.
            where: step and phase, for the log.
            attempt: does the work; must leave things so that `undo` can bring back what was before.
            most: rows that there are; a greater size counts as this.
            undo: called before every further try.

        Raises:
            OutOfMemory: when one row does not fit.
        """
        while True:
            size = min(self.sizes[setting], most)
            try:
                return attempt(size)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                text = f"{where}: out of memory ({_amounts(error, self.device)}) with {setting}={size}"
            # Outside of the except block, so that the traceback no longer holds the tensors of the failed try.
            self.events += 1
            if size == 1:
                raise OutOfMemory(
                    f"{text}, which cannot be halved; use shorter responses or prompts, model.quantization or "
                    "model.trunk_layers (hydra-ppo plan shows what fits). The last checkpoint is intact."
                )
            self.sizes[setting] = size // 2
            undo()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.note(f"{text}; the same work is done again with {setting}={size // 2}, which stays.")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, HydraError):  # which may speak of it
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def _amounts(error: BaseException, device: torch.device) -> str:
    asked = _ASKED.search(str(error))
    wanted = f"{int(float(asked[1]) * _UNITS[asked[2]]):,} bytes asked" if asked else "bytes asked not known"
    free = free_bytes(device)
    return f"{wanted}, " + ("bytes free not known" if free is None else f"{free:,} bytes free")


def free_bytes(device: torch.device) -> int | None:
    """Return what the device can still give; None where that cannot be found out."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
