"""Several processes of one run, as torchrun would start them, each with everything imported already."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra_ppo.cli.rank_process import free_port
from tests.faults.child import Point, context, run

LIMIT = 120
"""Seconds after which processes count as hung."""


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what torchrun would set."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


class Ranks:
    """Processes that run one command together.

    Args:
        arguments: of `hydra-ppo`.
        logs: folder of what each prints.
        size: processes.
        points: by rank, where one kills itself; as of `tests.faults.child.run`.
    """

    def __init__(self, arguments: Sequence[str], logs: Path, size: int = 2, points: dict[int, Point] | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in range(size)]
        port = free_port()
        self.processes = [
            context().Process(
                target=_command, args=(variables(rank, size, port), list(arguments), str(log), (points or {}).get(rank))
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Return the exit codes, negative where one was killed."""
        deadline = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        assert not hung, f"ranks {hung} hang: " + " | ".join(log.read_text()[-500:] for log in self.logs if log.exists())
        return [process.exitcode for process in self.processes]  # type: ignore[misc]

    def said(self) -> list[str]:
        """Return what each printed."""
        return [log.read_text() for log in self.logs]


def _command(environment: dict[str, str], arguments: list[str], log: str, point: Point | None) -> None:
    os.environ.update(environment)
    run(arguments, log, point)


def together(work: Callable[..., Any], *arguments: Any, size: int = 2, timeout: float = 30.0) -> list[Any]:
    """Return by rank what `work(world, *arguments)` returns in each of some processes, or the error that it raised.

    Args:
        work: a function of a module.
        arguments: of the function, which can be pickled.
        size: processes.
        timeout: of the world, in seconds.
    """
    queue = context().Queue()
    port = free_port()
    processes = [
        context().Process(target=_work, args=(variables(rank, size, port), work, arguments, timeout, queue))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < sum(process.exitcode in (None, 0) for process in processes):
        try:
            rank, result = queue.get(timeout=0.2)
            found[rank] = pickle.loads(result)
        except multiprocessing.queues.Empty:  # type: ignore[attr-defined]
            pass
    for process in processes:
        process.join(30)
        process.kill()
    return [found.get(rank) for rank in range(size)]


def _work(environment: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any], timeout: float, queue: Any) -> None:
    os.environ.update(environment)
    import torch

    from hydra_ppo.parallel.joining import join

    torch.set_num_threads(1)
    try:
        world = join(timeout)
        with world.session():
            result = work(world, *arguments)
    except BaseException as error:
        error.__traceback__, error.__cause__, error.__context__ = None, None, None
        result = error
    try:
        packed = pickle.dumps(result)
    except Exception:
        packed = pickle.dumps(RuntimeError(traceback.format_exc()))
    queue.put((int(environment["RANK"]), packed))
    queue.close()
    queue.join_thread()
