"""Simulations that will be asked for, begun in processes of their own while this one does its share.

A simulation is Python throughout, so threads would take turns.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Key = TypeVar("Key")


class Ahead(Generic[Key]):
    """Calls a function of keys, once for each, here and in other processes.

    Args:
        call: of one key; a function of a module, or a partial of one. What it returns can be pickled.
        workers: processes, this one counted; 1 begins nothing ahead.
    """

    def __init__(self, call: Callable[[Key], Any], workers: int) -> None:
        self.call, self.workers = call, workers
        self._pool: ProcessPoolExecutor | None = None
        self._begun: dict[Key, Future[Any]] = {}
        self._here: dict[Key, Any] = {}

    def begin(self, keys: Iterable[Key]) -> None:
        """Begin with those that were not begun yet, in this order."""
        if self.workers < 2:
            return
        new = [key for key in dict.fromkeys(keys) if key not in self._begun and key not in self._here]
        if new and self._pool is None:
            # A fork would take torch's threads along half way.
            self._pool = ProcessPoolExecutor(self.workers - 1, multiprocessing.get_context("spawn"), _prepare)
        for key in new:
            assert self._pool is not None
            self._begun[key] = self._pool.submit(self.call, key)

    def result(self, key: Key) -> Any:
        """Return what the call gives: from here where nobody has begun with it, else while others are called here."""
        self._take(key)
        while key not in self._here and not self._begun[key].done():
            # What is wanted last is least likely to be begun elsewhere before it is done here.
            if not any(self._take(other) for other in reversed(list(self._begun))):
                break
        return self._here[key] if key in self._here else self._begun[key].result()

    def _take(self, key: Key) -> bool:
        """Call for a key here, where no other process has begun with it; say whether."""
        if key in self._here or (key in self._begun and not self._begun[key].cancel()):
            return False
        self._begun.pop(key, None)
        self._here[key] = self.call(key)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.terminate()  # what it is at nobody will ask for


def _prepare() -> None:
    import torch

    from hydra_ppo.cli.main import set_up_output

    torch.set_num_threads(1)
    set_up_output()
