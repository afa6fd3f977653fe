"""A run in a process of its own, which may kill itself at a chosen point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from hydra_ppo.runtime import interruption

PRELOAD = [
    "hydra_ppo.cli.commands",
    "hydra_ppo.training.ppo",
    "hydra_ppo.training.joint_sft",
    "hydra_ppo.cli.resume",
    "tests.faults.rewards",
]
PHASES = {
    "rollout": "rollout.decoder",
    "score": "rollout.collect",
    "update": "training.ppo_update",
    "sft-update": "training.joint_sft",
}
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")

Point = tuple[str, int]
"""Where a process kills itself: a phase, "write" or a folder, and the how-manieth micro-step, touch of a checkpoint's files or
change below that folder."""


EVENTS = "changes of files: "
"""What a run that lived says of how many there were."""
_seen = {"count": 0}


def context() -> multiprocessing.context.ForkServerContext:
    """Return a source of processes that have imported everything already."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def run(arguments: list[str], log: str, point: Point | None = None, limit: dict[str, int] | None = None) -> None:
    """Run a command; what it prints goes to `log`.

    Args:
        point: where to die.
        limit: `file_bytes`, the largest file that may be written, as on a disk that is full.
    """
    import torch

    from hydra_ppo.cli.main import main

    torch.set_num_threads(1)
    with Path(log).open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        if point is not None:
            _die_at(*point)
        if limit is not None:
            _limit(limit["file_bytes"])
        code = main(arguments)
        if point is not None and point[0].startswith("/"):
            print(f"{EVENTS}{_seen['count']}")
        file.flush()
        os._exit(code)


def _die_at(where: str, number: int) -> None:
    def count() -> None:
        _seen["count"] += 1
        if _seen["count"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if where.startswith("/"):

        def hear_all(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and _changes(event, arguments) and where in f"{arguments[0]}/":
                count()

        sys.addaudithook(hear_all)
        return
    if where == "memory":  # nobody dies: a pass of the critic finds no memory
        _lack_memory(number)
        return
    if where == "write":

        def hear(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and "/checkpoints/" in str(arguments[0]):
                count()

        sys.addaudithook(hear)
        return
    check = interruption.check_stop

    def counting() -> None:
        count()
        check()

    import importlib

    importlib.import_module(f"hydra_ppo.{PHASES[where]}").check_stop = counting


def _lack_memory(number: int) -> None:
    from hydra_ppo.training.ppo_update import Updates

    backward = Updates.critic_backward

    def failing(self, *arguments):  # type: ignore[no-untyped-def]
        _seen["count"] += 1
        if _seen["count"] == number:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return backward(self, *arguments)

    Updates.critic_backward = failing  # type: ignore[method-assign]


def _changes(event: str, arguments: tuple) -> bool:
    """Say whether an event changes a file: opening one to read does not."""
    return event != "open" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _limit(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
