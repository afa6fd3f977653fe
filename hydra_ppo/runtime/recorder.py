"""What a trainer tells the outside: metrics, samples, progress, notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Recorder(Protocol):
    """Anything that takes in what a trainer has to say; `hydra_ppo.runs.run.Run` writes it to a run folder."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take the metrics of one step; None means not measured."""

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Take samples of one step."""

    def alarm(self, step: int, name: str, line: str, values: Mapping[str, float | None]) -> None:
        """Take an alarm: its name, what was seen and what to do in one line, and the numbers in it."""

    def progress(self, total: int, description: str) -> AbstractContextManager[Callable[[int, str], None]]:
        """Open a progress display; the callable advances it by n and shows a text."""

    def note(self, text: str) -> None:
        """Take one line for the user."""


class Silent:
    """A recorder that drops everything, for use from Python."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Drop it."""

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Drop them."""

    def alarm(self, step: int, name: str, line: str, values: Mapping[str, float | None]) -> None:
        """Drop it."""

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Callable[[int, str], None]]:
        """Show nothing."""

        def advance(n: int, text: str = "") -> None:
            pass

        yield advance

    def note(self, text: str) -> None:
        """Drop it."""
