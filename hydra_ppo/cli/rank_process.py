"""One rank as a process of its own: started with what torchrun would tell it, listened to, and ended.

Imports nothing but the standard library and no other module, and knows nothing of Ray: an object of it lives wherever the rank
runs.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

LONGEST = 2**16
"""Bytes of a line after which it counts as one."""
WAITING = 10_000
"""Lines that wait to be fetched; beyond that the rank waits in what it prints."""

FOLLOW = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit('whoever started this rank is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
"""Has Linux send SIGTERM when the process dies that started this one (prctl, PR_SET_PDEATHSIG), then becomes the rank: a run
that nobody listens to any more stops where it can go on from."""


class Report(NamedTuple):
    """What a rank has done since it was last asked.

    Attributes:
        lines: each the stream (1 is standard output, 2 standard error) and what was printed.
        code: its exit code, below 0 the signal that killed it; None while it runs, or while there are lines.
        ended: when that was, in seconds of the clock of its machine.
    """

    lines: list[tuple[int, str]]
    code: int | None
    ended: float | None


class RankProcess:
    """A rank.

    Args:
        command: program and arguments.
        variables: of its environment, on top of that of this process; None takes one away.
        folder: it runs in.

    Raises:
        OSError: where the folder is not there or the program cannot be started.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str | None], folder: str) -> None:
        environment = os.environ | {name: value for name, value in variables.items() if value is not None}
        for name, value in variables.items():
            if value is None:
                environment.pop(name, None)
        start = [sys.executable, "-c", FOLLOW, str(os.getpid()), *command] if sys.platform == "linux" else list(command)
        self._process = subprocess.Popen(
            start,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C reaches the launcher, which passes it on
        )
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue(WAITING)
        self._ended: float | None = None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(number, stream), daemon=True)
            for number, stream in ((1, self._process.stdout), (2, self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, stream: IO[bytes]) -> None:
        rest = b""
        while piece := stream.read1(LONGEST):  # type: ignore[attr-defined]  # of a pipe, which is buffered
            *whole, rest = (rest + piece).split(b"\n")
            if len(rest) > LONGEST:
                whole, rest = [*whole, rest], b""
            for line in whole:
                self._lines.put((number, shown(line)))
        if rest:
            self._lines.put((number, shown(rest)))

    def report(self, wait: float) -> Report:
        """Return what was printed, after at most `wait` seconds; the exit code with or after the last line."""
        lines: list[tuple[int, str]] = []
        until = time.monotonic() + wait
        while not lines and time.monotonic() < until and not self._is_over():
            with suppress(queue.Empty):
                lines.append(self._lines.get(timeout=min(0.1, max(0.0, until - time.monotonic()))))
        with suppress(queue.Empty):
            while len(lines) < 1000:
                lines.append(self._lines.get_nowait())
        over = self._is_over() and self._lines.empty()
        return Report(lines, self._process.returncode if over else None, self._ended if over else None)

    def _is_over(self) -> bool:
        """Whether the rank has ended and all that it printed was read.

        Not that of a process that it started and left behind: that would keep the pipes open for ever.
        """
        if self._process.poll() is None:
            return False
        self._ended = self._ended or time.time()
        late = time.time() - self._ended > 2.0
        return late or not any(reader.is_alive() for reader in self._readers)

    def send(self, number: int) -> None:
        """Send the rank a signal; SIGKILL to all that it started in its session, too."""
        if self._process.poll() is not None and number != signal.SIGKILL:
            return
        with suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)


def shown(line: bytes) -> str:
    """Return a line as a terminal shows it at last: what a progress bar has overwritten is left out."""
    text = line.decode("utf-8", "backslashreplace").rstrip("\r")
    return text.rpartition("\r")[2]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
