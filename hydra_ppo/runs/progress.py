"""How far a run is: a bar on a terminal, and a line now and then where output goes to a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, str], None]

EVERY = 15.0
"""Seconds between two lines."""


@contextmanager
def shown_progress(console: Console, total: int, description: str) -> Iterator[Advance]:
    """Show how far something is; yields `advance(steps, text)`, where text says how it goes.

    Args:
        console: a terminal gets a bar, anything else lines.
        total: steps.
        description: what is done.
    """
    if not console.is_terminal:
        yield Lines(total, description, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, text="")

        yield lambda steps, text: bar.update(task, advance=steps, text=text)


class Lines:
    """Says a line when the last is `EVERY` seconds old: steps done, time gone, and what is left at the pace so far."""

    def __init__(
        self, total: int, description: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._description, self._say, self._clock = total, description, say, clock
        self._done, self._before = 0, 0
        self._begun = self._said = clock()

    def __call__(self, steps: int, text: str) -> None:
        """Count steps; `text` is the end of the line. What was done before the first step counts for nothing in the pace."""
        self._done += steps
        now = self._clock()
        if not text:  # of a run that goes on
            self._before = self._done
            return
        if now - self._said < EVERY:
            return
        self._said = now
        gone, here = now - self._begun, self._done - self._before
        left = "" if here == 0 else f", about {_clock(gone / here * (self._total - self._done))} left"
        self._say(f"{self._description} {self._done} of {self._total}, {_clock(gone)} gone{left}; {text}")


def _clock(seconds: float) -> str:
    """Return 75 as 1:15, and 3700 as 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
