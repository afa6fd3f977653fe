"""Turns the JSON that pytest-benchmark wrote into a table and a compact JSON file.

``python -m hydra_ppo.profiling.benchmarks.table BENCH_JSON --output OUT_JSON``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.cli.main import BAD_INPUT, DONE
from hydra_ppo.errors import DataError
from hydra_ppo.runtime.tables import print_table

MIB = 2**20
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One call of one benchmark; None stands for what was not measured.

    Attributes:
        title, call: of the benchmark, and of the call within it.
        seconds: median of one call.
        rounds: that the median is over.
        peak_bytes: over what was alive before the call.
        tokens_per_second: as the benchmark counts tokens.
        baseline: call of the same benchmark that this one is compared with.
        seconds_ratio, peak_ratio: this call's over the baseline's; below 1 is better.
    """

    title: str
    call: str
    seconds: float
    rounds: int
    peak_bytes: int | None
    tokens_per_second: float | None
    baseline: str | None
    seconds_ratio: float | None
    peak_ratio: float | None


@dataclass(frozen=True)
class Summary:
    """All rows, and where and when they were measured.

    Attributes:
        measured: time, as pytest-benchmark wrote it.
        commit: of the code; a "+" behind it says that files had been changed since.
        machine: cpu, cores, threads, system, python, torch.
    """

    measured: str
    commit: str | None
    machine: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write the summary as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Summary:
    """Read what ``pytest --benchmark-json`` wrote.

    Raises:
        DataError: when the file is not that, or holds a benchmark that `measure` did not make.
    """
    remedy = "run pytest profiling/benchmarks -o python_files='bench_*.py' --benchmark-json FILE"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {remedy}.") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {remedy}.") from error
    try:
        benchmarks, machine, commit = data["benchmarks"], data["machine_info"], data["commit_info"]
        if not benchmarks:
            raise DataError(f"{path}: benchmarks=[] holds nothing to show; {remedy}.")
        shared = benchmarks[0]["extra_info"]
        revision = commit.get("id")
        return Summary(
            data["datetime"],
            revision and revision + ("+" if commit.get("dirty") else ""),
            {
                "cpu": machine["cpu"].get("brand_raw"),
                "cores": machine["cpu"].get("count"),
                "threads": shared["threads"],
                "system": machine["system"],
                "python": machine["python_version"],
                "torch": shared["torch"],
            },
            [row for benchmark in benchmarks for row in _rows(benchmark)],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not written by the benchmarks of this package ({error!r}); {remedy}.") from error


def draw(summary: Summary) -> Table:
    """Return the table: milliseconds, MiB, and ratios to the baseline."""
    machine = summary.machine
    where = f"{machine['cpu']}, {machine['cores']} cores, threads used: {machine['threads']}, torch {machine['torch']}"
    table = Table(title=f"Benchmarks: {where}", title_justify="left", caption_justify="left")
    table.caption = "x: relative to the line marked *, below 1 is less. Peak: over what was alive before the call."
    table.add_column("benchmark")
    table.add_column("call")
    for name in ("ms", "x", "peak MiB", "x", "tokens/s"):
        table.add_column(name, justify="right")
    title = None
    for row in summary.rows:
        table.add_row(
            Text(row.title if row.title != title else ""),
            Text(row.call + (" *" if row.call == row.baseline else "")),
            f"{1000 * row.seconds:,.2f}",
            _show(row.seconds_ratio, 2),
            _show(None if row.peak_bytes is None else row.peak_bytes / MIB, 1),
            _show(row.peak_ratio, 2),
            _show(row.tokens_per_second, 0),
        )
        title = row.title
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Show the table and write the JSON; return 0, or 2 for bad input.

    Args:
        argv: arguments after the program's name; None takes them from ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hydra_ppo.profiling.benchmarks.table", description="Show what the benchmarks measured."
    )
    parser.add_argument("bench_json", metavar="BENCH_JSON", type=Path, help="What pytest --benchmark-json wrote.")
    parser.add_argument("--output", metavar="OUT_JSON", type=Path, required=True, help="Compact JSON to write.")
    options = parser.parse_args(argv)
    try:
        summary = read(options.bench_json)
    except DataError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    summary.save(options.output)
    print_table(Console(), draw(summary))
    return DONE


def _rows(benchmark: dict[str, Any]) -> list[Row]:
    info = benchmark["extra_info"]
    seconds, baseline = info["seconds"], info["baseline"]
    peaks, rates = info.get("peak_bytes", {}), info.get("tokens_per_second", {})
    return [
        Row(
            info["title"],
            call,
            seconds[call],
            benchmark["stats"]["rounds"],
            peaks.get(call),
            rates.get(call),
            baseline,
            seconds[call] / seconds[baseline] if baseline is not None else None,
            peaks[call] / peaks[baseline] if baseline is not None and peaks else None,
        )
        for call in seconds
    ]


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
