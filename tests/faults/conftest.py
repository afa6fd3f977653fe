"""Prints a line per fault at the end: injected, survived, compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

FAULTS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Take in what was injected, how it was survived and what the result equals; called at the end of a test."""

    def report(injected: str, survived: str, compared: str) -> None:
        request.config.stash.setdefault(FAULTS, []).append((injected, survived, compared))

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    lines = config.stash.get(FAULTS, [])
    if lines:
        terminalreporter.section("faults")
    for injected, survived, compared in lines:
        terminalreporter.write_line(f"injected: {injected} | survived: {survived} | compared: {compared}")
