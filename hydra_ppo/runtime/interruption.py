"""Stops a run where nothing is lost: the first SIGTERM, SIGINT or SIGHUP is heard at the next safe place, a second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
TOGETHER = 1.0
"""Seconds within which signals are one: a terminal that closes, a scheduler and `timeout` send several."""


class StopRequested(BaseException):
    """Raised where a run stops on request. Not an Exception, so that nothing on the way takes it for a failure."""


class _Request:
    """What is known of a wish to stop. Signals reach a process, so there is one of these."""

    def __init__(self) -> None:
        self.made = False
        self.at_once = 0
        self.waiting = 0
        self.when = 0.0
        self.depth = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take in a signal."""
        if self.made:
            if time.monotonic() - self.when < TOGETHER:
                return
            raise KeyboardInterrupt
        self.made, self.when = True, time.monotonic()
        if self.at_once:
            raise StopRequested(signal.Signals(number).name)


_request = _Request()


def _forget_in_child() -> None:
    """Give a forked child the signals that every process has: ours would let it live on, and whoever ends it wait for ever."""
    for number in SIGNALS:
        if signal.getsignal(number) == _request.hear:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _request.made, _request.at_once, _request.waiting, _request.depth = False, 0, 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _without_a_word(before: Callable[[Any], Any], what: Any) -> None:
    """Say nothing of a stop that came while Python cleared up an object, where it can go no further; it is not forgotten."""
    if not issubclass(what.exc_type, StopRequested | KeyboardInterrupt):
        before(what)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let SIGTERM, SIGINT and SIGHUP inside the block ask for a stop; outside the main thread, which alone gets them, nothing.

    A signal that is ignored stays so: `nohup` ignores SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = _request.depth == 0
    if outermost:
        _request.made = False
    _request.depth += 1
    unraisable = sys.unraisablehook
    sys.unraisablehook = partial(_without_a_word, unraisable)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, _request.hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable
        _request.depth -= 1
        if outermost:
            _request.made = False


@contextmanager
def stopping_after(seconds: float | None) -> Iterator[None]:
    """Ask for a stop as SIGTERM does once so many seconds have passed inside the block; None never does.

    Goes inside `stopping_on_signals`, in the main thread, which alone gets signals.
    """
    if seconds is None:
        yield
        return
    alarm = threading.Timer(seconds, partial(os.kill, os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise StopRequested inside the block as soon as a signal comes: where waiting is long and nothing is half done."""
    check_stop()
    _request.at_once += 1
    try:
        yield
    except Exception as error:
        if _request.made:  # a stop that came in the middle of an import may leave it as another error
            raise StopRequested from error
        raise
    finally:
        _request.at_once -= 1
    check_stop()  # one that was lost on the way


@contextmanager
def stops_wait() -> Iterator[None]:
    """Let `check_stop` pass over a wish inside the block: where one process that stopped would leave others waiting."""
    _request.waiting += 1
    try:
        yield
    finally:
        _request.waiting -= 1


def check_stop() -> None:
    """Raise StopRequested where a stop was asked for. Called between micro-steps; costs nothing."""
    if _request.made and not _request.waiting:
        raise StopRequested
