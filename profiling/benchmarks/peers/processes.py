"""The driver's end of a worker: a process that does one update, or measures one, whenever it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from hydra_ppo.errors import HydraError

TAIL = 400
"""Characters of a dead worker's stderr that are shown."""


class WorkerError(HydraError, RuntimeError):
    """A worker died, or said something that is not an answer."""


class Worker:
    """Starts a worker and waits until it is built.

    Args:
        name: of the contestant, for error messages.
        command: program and arguments.
        variables: environment variables on top of this process's own.

    Raises:
        WorkerError: when it does not get ready.
    """

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self.name = name
        self._stack = ExitStack()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, the stack closes it with the rest
        self._stack.enter_context(self._errors)
        self._process = self._stack.enter_context(
            subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env={**os.environ, **variables},
            )
        )
        try:
            self._answer("building")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def ask(self, command: str) -> dict[str, Any]:
        """Send `update`, `measure` or `quit` and wait for the answer.

        Raises:
            WorkerError: when the worker dies over it.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead; reading its answer says how
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer(command)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        with suppress(BrokenPipeError):  # a command that it never read
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _answer(self, command: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(
                f"{self.name} died at {command!r} with exit code {self._process.wait()}: {self._tail()}; mend that, or leave "
                "it out with --only."
            )
        try:
            return json.loads(line)
        except ValueError as error:
            raise WorkerError(
                f"{self.name} answered {line.strip()[:TAIL]!r} to {command!r}, which is not JSON; print that to stderr instead."
            ) from error

    def _tail(self) -> str:
        """Return the end of its stderr on one line."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        return " ".join(text.split())[-TAIL:] or "nothing on stderr"
