"""Prints a line per fault at the end: injected, survived, compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

NAME = "fault"


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Take in what was injected, how it was survived and what the result equals; called at the end of a test."""

    def report(injected: str, survived: str, compared: str) -> None:
        # A property of the test, and no state of the process: with xdist another one prints the table.
        request.node.user_properties.append((NAME, f"injected: {injected} | survived: {survived} | compared: {compared}"))

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    lines = [line for report in reports for name, line in report.user_properties if name == NAME]
    if lines:
        terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
