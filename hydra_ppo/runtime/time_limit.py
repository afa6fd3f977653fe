"""Ends a call of foreign code that takes too long."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hydra_ppo.errors import ConfigError

SIGNAL = signal.SIGRTMIN + 5 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""Not SIGALRM, which reward functions use for limits of their own."""
GRACE = 30.0
"""Seconds that code which Python cannot interrupt is waited for, before the process ends."""


RENDERING = 10.0
"""Seconds that a chat template may take for one conversation; real ones take some thousandth."""


class TimeLimitExceeded(Exception):
    """The block took too long."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeLimitExceeded inside the block after so many seconds; None sets no limit.

    Sleeping and waiting for a network are cut short, as is Python code. C code that never returns to Python is not: then
    the process ends after `GRACE` more seconds.

    Raises:
        ConfigError: outside the main thread, which alone can be interrupted.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(f"reward.time_limit={seconds} needs the main thread of the process; train there, or set it to null.")
    main = threading.get_ident()
    done = threading.Event()

    def ring(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise TimeLimitExceeded

    def watch() -> None:
        if done.wait(seconds):
            return
        signal.pthread_kill(main, SIGNAL)
        if done.wait(GRACE):
            return
        print(f"a call took over {seconds:g} s and cannot be interrupted; the process ends.", file=sys.stderr, flush=True)
        os._exit(1)

    # Left in place afterwards: a signal on its way would otherwise end the process.
    signal.signal(SIGNAL, ring)
    threading.Thread(target=watch, daemon=True, name="time-limit").start()
    try:
        yield
    finally:
        done.set()


class _TooLong(BaseException):
    """Not an Exception, so that a template's own machinery lets it through."""


@contextmanager
def rendering_limit(seconds: float = RENDERING) -> Iterator[None]:
    """End the rendering of a chat template, which is a program of whoever made the model and may never end.

    Costs some microseconds; outside the main thread, which alone can be interrupted, nothing is limited.

    Raises:
        ConfigError: when the block takes longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    handler = signal.signal(signal.SIGALRM, ring)
    begun = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise ConfigError(
            f"the chat template takes over {seconds:g} s for one conversation; use a model whose template ends, or prompts of "
            "plain text."
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3) if left else 0.0, interval)
        signal.signal(signal.SIGALRM, handler)
