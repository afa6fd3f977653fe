"""A reward function in a process of its own, which can be ended whatever it does."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from pickle import PicklingError
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.runtime.random_states import read_states, write_states
from hydra_ppo.runtime.time_limit import TimeLimitExceeded

LOADING = 300.0
"""Seconds that the import of a function's module may take."""


class FunctionFailed(Exception):
    """A function raised, ended its process, or took it down; the message says which, and where.

    Args:
        message: goes on after its name.
        traceback: of the process that it ran in, where there is one.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        if traceback:
            self.add_note(traceback)  # which --traceback shows


class IsolatedFunction:
    """A function as a reward source, as `functions.FunctionSource`, in a process that is kept, ended and started again.

    Module, globals and clients that a function keeps live as long as the process does. It draws random numbers where this
    process left off, and this one goes on where it left off: the same numbers as if there were one process.

    Args:
        target: `package.module:function`.

    Memory: what the function's module imports, once more.

    Raises:
        ConfigError: as `FunctionSource`.
    """

    remedy = "mend the function"

    def __init__(self, target: str) -> None:
        self.target = target
        _worker(target)

    def check(self, columns: Collection[str]) -> None:
        """Refuse rows that lack a column which the function takes; raises ConfigError."""
        _worker(self.target).ask(("check", set(columns)), None)

    def __call__(self, responses: Responses, limit: float | None = None) -> Any:
        """Return what the function returns, arrays and tensors as lists.

        Args:
            responses: what it is given, as far as its parameters name it.
            limit: seconds that it may take; None sets no limit.

        Raises:
            TimeLimitExceeded: when it took longer; its process is killed.
            FunctionFailed: when it raised, or its process ended.
            ConfigError: when it takes what there is not.
        """
        _, value, states = _worker(self.target).ask(("call", responses, read_states()), limit)
        write_states(states)
        return value


def file_of(target: str) -> str | None:
    """Return the file that a function's module was read from; None where it has none."""
    return _worker(target).file


_workers: dict[str, _Worker] = {}


def _worker(target: str) -> _Worker:
    """Return the process of a function, a new one where there is none or it has ended."""
    known = _workers.get(target)
    if known is None or not known.alive:
        _workers[target] = known = _Worker(target)
    return known


@atexit.register
def end_workers() -> None:
    """End the processes of all functions, and what they started."""
    for worker in _workers.values():
        worker.kill()
    _workers.clear()


class _Worker:
    def __init__(self, target: str) -> None:
        if target.startswith("__main__:"):
            raise ConfigError(
                f"reward target={target!r} stands in the program itself, which no other process can import; put it into a "
                "module of its own, or set reward.isolation=thread."
            )
        self._target = target
        ours, theirs = Pipe()
        # A session of its own: Ctrl-C reaches this process alone, and all that the function starts can be ended with it.
        command = [sys.executable, "-m", "hydra_ppo.rewards.worker", str(theirs.fileno())]
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        self._connection: Connection = ours
        try:
            self.file: str | None = self.ask(("load", target, [str(Path.cwd()), *sys.path]), LOADING)[1]
        except TimeLimitExceeded:
            raise ConfigError(
                f"reward target={target!r} takes over {LOADING:g} s to import; do such work when the function is called."
            ) from None
        except FunctionFailed as error:
            raise ConfigError(f"reward target={target!r} cannot be imported: it {error}; mend the module.") from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: tuple[Any, ...], limit: float | None) -> tuple[Any, ...]:
        """Return the answer to a request. Whatever cuts the waiting short ends the process: it is busy then."""
        try:
            self._connection.send(request)
        except OSError:
            raise FunctionFailed(self._how_it_ended()) from None
        except (TypeError, AttributeError, ValueError, PicklingError) as error:
            raise ConfigError(
                f"reward target={self._target!r} is to be given what no other process can be given ({error}); set "
                "reward.isolation=thread, or leave such columns out of the rows."
            ) from error
        try:
            answer = self._answer(limit)
        except EOFError:
            raise FunctionFailed(self._how_it_ended()) from None
        except BaseException:
            self.kill()
            raise
        if answer[0] == "refused":
            raise ConfigError(answer[1])
        if answer[0] == "raised":
            _, said, place, trace = answer
            raise FunctionFailed(said + place, trace)
        return answer

    def _answer(self, limit: float | None) -> tuple[Any, ...]:
        end = None if limit is None else time.monotonic() + limit
        while not self._connection.poll(None if end is None else max(0.0, end - time.monotonic())):
            if end is not None and time.monotonic() >= end:
                raise TimeLimitExceeded
        answer: tuple[Any, ...] = self._connection.recv()
        return answer

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self.kill()
        if code >= 0:
            return f"ended its process with exit code {code}"
        name = signal.Signals(-code).name
        return f"lost its process to {name}" + (", as where memory runs out" if -code == signal.SIGKILL else "")
