"""`hydra-ppo compare`: runs side by side, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.cli.parser import Parser
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.report.charts import number
from hydra_ppo.report.gathered import Gathered, differing, gather_all
from hydra_ppo.runs.outcomes import outcomes

NAME = 32
"""Longest name that is kept on a line."""


def compare(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo compare`, and do it."""
    parser = Parser("compare", "Show in which settings runs differ, and what came of each; report draws them.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=local_path, help="Run folders of sft or ppo, two or more.")
    options = parser.parse_args(arguments)
    if len(options.runs) < 2:
        raise ConfigError("compare was given one run; name two or more, or use hydra-ppo inspect.")
    show(options.runs, Console())


def show(folders: Sequence[Path], console: Console) -> None:
    """Print both tables."""
    runs = gather_all(folders)
    console.print(_table("Settings in which they differ", "setting", runs, dict(differing(runs))))
    rows: dict[str, list[str]] = {"state": [str(run.found["state"]) for run in runs]}
    rows["last step"] = ["-" if run.found["last_step"] is None else number(run.found["last_step"]) for run in runs]
    found = [{one.name: one for one in outcomes(run.records, run.summary)} for run in runs]
    for name in dict.fromkeys(name for one in found for name in one):
        label = next(one[name].label for one in found if name in one)
        rows[label] = [_said(one.get(name)) for one in found]
    console.print(_table("Held-out evaluation: last, and gain since the first", "", runs, rows))


def _said(outcome: Any) -> str:
    if outcome is None:
        return "-"
    after = number(outcome.values[1])
    if outcome.gain is None:
        return after
    error = "" if outcome.error is None else f" ± {number(outcome.error)}"
    return f"{after} ({'+' if outcome.gain >= 0 else ''}{number(outcome.gain)}{error})"


def _table(title: str, first: str, runs: Sequence[Gathered], rows: dict[str, list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, no_wrap=max(map(len, rows), default=0) <= NAME, overflow="fold")
    for run in runs:
        table.add_column(Text(run.label), overflow="fold")
    for name, cells in rows.items():
        table.add_row(Text(name), *map(Text, cells))
    return table
