"""What the contestants' numbers come to: medians, ratios to ours round by round, a table, a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

MIB = 2**20


@dataclass(frozen=True)
class Result:
    """One contestant.

    Attributes:
        seconds: of each counted update; `seconds_median` is None where none was.
        seconds_ratio: median over the rounds of its seconds divided by ours of that round, so that noise hits both; None
            where ours did not take part.
        peak_bytes: most bytes of live tensor storages at once during one update in the steady state.
        peak_ratio: that divided by ours.
        versions: of Python and the packages in its environment.
    """

    name: str
    workload: str
    dtype: str
    threads: int
    seconds: list[float]
    seconds_median: float | None
    responses_per_second: float | None
    seconds_ratio: float | None
    peak_bytes: int
    peak_ratio: float | None
    versions: dict[str, str]


def collect(reports: Mapping[str, Mapping[str, Any]], ours: str, threads: int) -> list[Result]:
    """Compare the last answers of all workers.

    Args:
        reports: by name; the lists of seconds stand for the same rounds.
        ours: name of the contestant to compare with.
        threads: that each worker had.
    """
    base = reports.get(ours)
    return [
        Result(
            **{key: report[key] for key in ("name", "workload", "dtype", "seconds", "responses_per_second", "peak_bytes")},
            threads=threads,
            seconds_median=statistics.median(report["seconds"]) if report["seconds"] else None,
            seconds_ratio=median_ratio(report["seconds"], base["seconds"]) if base else None,
            peak_ratio=report["peak_bytes"] / base["peak_bytes"] if base else None,
            versions=dict(report["versions"]),
        )
        for report in reports.values()
    ]


def median_ratio(seconds: Sequence[float], ours: Sequence[float]) -> float | None:
    """Return the median of the ratios round by round; None without a round."""
    ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    return statistics.median(ratios) if ratios else None


def table(results: Sequence[Result], title: str) -> Table:
    """Return what is printed at the end."""
    shown = Table(title=title)
    for column in ("contestant", "s/update", "responses/s", "time/ours", "peak MiB", "peak/ours"):
        shown.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for result in results:
        shown.add_row(
            result.name,
            _number(result.seconds_median, ".3f"),
            _number(result.responses_per_second, ".3f"),
            _number(result.seconds_ratio, ".2f"),
            _number(result.peak_bytes / MIB, ".1f"),
            _number(result.peak_ratio, ".2f"),
        )
    return shown


def write(results: Sequence[Result], path: Path) -> None:
    """Write the results as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
