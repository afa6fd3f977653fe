"""Simulations that will be asked for, begun in processes of their own while others are waited for.

A simulation is Python throughout, so threads would take turns. This process only waits: where it simulated too, with one
process fewer beside it, it was busy with what may not be asked for when what was asked for was ready (78 s for a plan of 8B on
6 GiB against 62 s, 2 cores of an AMD EPYC).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Key = TypeVar("Key")


class Ahead(Generic[Key]):
    """Calls a function of keys in other processes, once for each.

    Args:
        call: of one key; a function of a module, or a partial of one. What it returns can be pickled.
        workers: processes; 1 begins nothing ahead.
    """

    def __init__(self, call: Callable[[Key], Any], workers: int) -> None:
        self.call, self.workers = call, workers
        self._pool: ProcessPoolExecutor | None = None
        self._begun: dict[Key, Future[Any]] = {}

    def begin(self, keys: Iterable[Key]) -> None:
        """Begin with those that were not begun yet, in this order."""
        if self.workers < 2:
            return
        new = [key for key in dict.fromkeys(keys) if key not in self._begun]
        if new and self._pool is None:
            # A fork would take torch's threads along half way.
            self._pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _prepare)
        for key in new:
            assert self._pool is not None
            self._begun[key] = self._pool.submit(self.call, key)

    def result(self, key: Key) -> Any:
        """Return what the call gives, waiting for it where it was begun."""
        self.begin([key])
        return self._begun[key].result() if key in self._begun else self.call(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            workers = list((getattr(self._pool, "_processes", None) or {}).values())  # which `shutdown` forgets
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()  # what it is at nobody will ask for


def _prepare() -> None:
    import torch

    from hydra_ppo.cli.main import set_up_output

    torch.set_num_threads(1)
    set_up_output()
