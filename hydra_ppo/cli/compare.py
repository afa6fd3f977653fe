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
from hydra_ppo.report.record import RunRecord, differing_settings, read_runs
from hydra_ppo.runs.outcomes import outcomes
from hydra_ppo.runtime.tables import print_table


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
    runs = read_runs(folders)
    differing = {name: list(values) for name, *values in differing_settings(runs)}
    print_table(console, _table("Settings in which they differ", "setting", runs, differing))
    rows: dict[str, list[str]] = {"state": [str(run.info["state"]) for run in runs]}
    rows["last step"] = ["-" if run.info["last_step"] is None else number(run.info["last_step"]) for run in runs]
    found = [{one.name: one for one in outcomes(run.records, run.summary)} for run in runs]
    for name in dict.fromkeys(name for one in found for name in one):
        label = next(one[name].label for one in found if name in one)
        rows[label] = [_said(one.get(name)) for one in found]
    print_table(console, _table("Held-out evaluation: last, and gain since the first", "", runs, rows))


def _said(outcome: Any) -> str:
    if outcome is None:
        return "-"
    after = number(outcome.values[1])
    if outcome.gain is None:
        return after
    error = "" if outcome.error is None else f" ± {number(outcome.error)}"
    return f"{after} ({'+' if outcome.gain >= 0 else ''}{number(outcome.gain)}{error})"


def _table(title: str, first: str, runs: Sequence[RunRecord], rows: dict[str, list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first)
    for run in runs:
        table.add_column(Text(run.label))
    for name, cells in rows.items():
        table.add_row(Text(name), *map(Text, cells))
    return table
