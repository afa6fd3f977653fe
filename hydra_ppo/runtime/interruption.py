"""Stops a run where nothing is lost: the first SIGTERM or SIGINT is heard at the next safe place, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """Raised where a run stops on request. Not an Exception, so that nothing on the way takes it for a failure."""


class _Request:
    """What is known of a wish to stop. Signals reach a process, so there is one of these."""

    def __init__(self) -> None:
        self.made = False
        self.at_once = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take in a signal."""
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        if self.at_once:
            raise StopRequested(signal.Signals(number).name)


_request = _Request()


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT inside the block ask for a stop; outside the main thread, which alone gets signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.made = False
    before: dict[int, Any] = {number: signal.signal(number, _request.hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request.made = False


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise StopRequested inside the block as soon as a signal comes: where waiting is long and nothing is half done."""
    check_stop()
    _request.at_once += 1
    try:
        yield
    finally:
        _request.at_once -= 1


def check_stop() -> None:
    """Raise StopRequested where a stop was asked for. Called between micro-steps; costs nothing."""
    if _request.made:
        raise StopRequested
