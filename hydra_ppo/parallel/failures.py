"""How an error of one process is told to the others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hydra_ppo.errors import HydraError
from hydra_ppo.runtime.exhaustion import is_out_of_memory
from hydra_ppo.runtime.interruption import StopRequested

FINE, STOP, MEMORY, FAILED = range(4)
"""How a process fares; the worst one counts."""


class OtherOutOfMemory(RuntimeError):
    """Memory ran out in another process; its text is what that one said."""


def code_of(failure: BaseException | None) -> int:
    """Return how a process fares that failed in this way, or not at all."""
    if failure is None:
        return FINE
    if isinstance(failure, StopRequested):
        return STOP
    return MEMORY if not isinstance(failure, HydraError) and is_out_of_memory(failure) else FAILED


def is_lost(failure: BaseException) -> bool:
    """Say whether an error is one of a collective that another process has left."""
    text = str(failure)
    return isinstance(failure, dist.DistError) or (
        isinstance(failure, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection closed by peer"))
    )


def words_of(failure: BaseException | None) -> str:
    """Return what others are told of a failure, in a line; the class too, where its text was not written for users."""
    if failure is None or isinstance(failure, HydraError | StopRequested):
        return str(failure or "")
    return f"{type(failure).__name__}: {failure}".rstrip(": ")


def said(error: Any, rank: int) -> Any:
    """Note on an error which rank says it; the others end without a word."""
    error.said_by = rank
    return error
