"""What the contestants' numbers come to: medians, ratios round by round, shares of the floor, tables, a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hydra_ppo.profiling.benchmarks.peers.floor import multiply_adds, shares
from hydra_ppo.profiling.benchmarks.peers.workloads import Contestant, Workload
from hydra_ppo.profiling.benchmarks.phases import PHASES

MIB = 2**20
GIGA = 1e9

OURS = "hydra"
PEER = "trl112-lora"
"""The two contestants, both in fp32, that the others are compared with."""

TORCH_MATMUL = "torch.matmul"


@dataclass(frozen=True)
class Floor:
    """Time that the multiply-adds need which nobody could leave out, beside the time taken.

    Attributes:
        multiply_adds: by phase.
        rates: multiply-adds per second of a large matrix product in the same run and type, by kernel; medians.
        share_torch_matmul, share_best_kernel: floor over time taken, by phase and for the `whole`, at the rate of torch.matmul
            and at the best one.
    """

    multiply_adds: dict[str, int]
    rates: dict[str, float]
    share_torch_matmul: dict[str, float]
    share_best_kernel: dict[str, float]


@dataclass(frozen=True)
class Result:
    """One contestant and workload; None stands for what was not measured.

    Attributes:
        trunk_layers: layers below all adapters; 0 for the peers.
        dtype: of the base's weights.
        seconds_per_update: median over the rounds.
        responses_per_second: at that median.
        peak_bytes: most bytes of live tensor storages at once during one update in the steady state.
        static_bytes: fewest during that update: models, adapters, optimizer state.
        seconds: of each counted update.
        disturbed: for each, whether others used the machine meanwhile; None where the system keeps no such accounts.
        threads: that it had.
        seconds_ratio: median over the rounds of its seconds divided by those of `OURS` of that round, so that noise hits both.
        speedup: median over the rounds of the seconds of `PEER` divided by its own.
        peak_ratio: its peak divided by that of `OURS`.
        phase_seconds: medians of rollout, score and update, where its trainer announces them.
        floor: where it announces its phases.
        versions: of Python and the packages in its environment.
    """

    name: str
    workload: str
    trunk_layers: int
    dtype: str
    seconds_per_update: float | None
    responses_per_second: float | None
    peak_bytes: int
    static_bytes: int
    seconds: list[float]
    disturbed: list[bool | None]
    threads: int
    seconds_ratio: float | None
    speedup: float | None
    peak_ratio: float | None
    phase_seconds: dict[str, float] | None
    floor: Floor | None
    versions: dict[str, str]


def collect(
    workload: Workload,
    chosen: Sequence[Contestant],
    reports: Mapping[str, Mapping[str, Any]],
    rates: Mapping[str, Mapping[str, float]],
    threads: int,
) -> list[Result]:
    """Compare what was measured.

    Args:
        chosen: the contestants.
        reports: by name: the worker's last answer, and `seconds`, `phases` and `disturbed` of the same rounds.
        rates: by type, multiply-adds per second by kernel.
        threads: that each worker had.
    """
    ours, peer = reports.get(OURS), reports.get(PEER)
    results = []
    for contestant in chosen:
        report = reports[contestant.name]
        seconds, phases = list(report["seconds"]), medians(report["phases"])
        typical = statistics.median(seconds) if seconds else None
        known_rates = rates.get(contestant.dtype)
        results.append(
            Result(
                name=contestant.name,
                workload=workload.name,
                trunk_layers=contestant.trunk_layers,
                dtype=contestant.dtype,
                seconds_per_update=typical,
                responses_per_second=workload.rows / typical if typical else None,
                peak_bytes=report["peak_bytes"],
                static_bytes=report["static_bytes"],
                seconds=seconds,
                disturbed=list(report["disturbed"]),
                threads=threads,
                seconds_ratio=median_ratio(seconds, ours["seconds"]) if ours else None,
                speedup=median_ratio(peer["seconds"], seconds) if peer else None,
                peak_ratio=report["peak_bytes"] / ours["peak_bytes"] if ours else None,
                phase_seconds=phases,
                floor=floor(workload, contestant, phases, known_rates) if phases and known_rates else None,
                versions=dict(report["versions"]),
            )
        )
    return results


def floor(workload: Workload, contestant: Contestant, seconds: Mapping[str, float], rates: Mapping[str, float]) -> Floor:
    """Compare the time taken, by phase, with what the multiply-adds need at these rates, those of the contestant's type."""
    work = multiply_adds(workload, contestant.trunk_layers, merged_rollout=contestant.merged)
    return Floor(work, dict(rates), shares(work, seconds, rates[TORCH_MATMUL]), shares(work, seconds, max(rates.values())))


def median_ratio(seconds: Sequence[float], ours: Sequence[float]) -> float | None:
    """Return the median of the ratios round by round; None without a round."""
    ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    return statistics.median(ratios) if ratios else None


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Return the median of each name over the rounds; None without a round."""
    return {name: statistics.median(numbers[name] for numbers in found) for name in found[0]} if found else None


def table(results: Sequence[Result], title: str) -> Table:
    """Return what is printed at the end, of one workload."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    notes = [f"x ours: its time, or peak, over that of {OURS}. speedup: time of {PEER} over its own. MiB of live tensors."]
    if any(any(result.disturbed) for result in results):
        notes.append("* disturbed: others used the machine, in more rounds than are repeated.")
    if any(None in result.disturbed for result in results):
        notes.append("This system does not say what others used of the machine; keep it quiet.")
    shown.caption = "\n".join(notes)
    for column in ("contestant", "s/update", "resp./s", "x ours", "speedup", "peak", "x ours", "static"):
        shown.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for result in results:
        shown.add_row(
            result.name,
            _number(result.seconds_per_update, ".3f") + (" *" if any(result.disturbed) else ""),
            _number(result.responses_per_second, ".3f"),
            _number(result.seconds_ratio, ".2f"),
            _number(result.speedup, ".2f"),
            _number(result.peak_bytes / MIB, ".1f"),
            _number(result.peak_ratio, ".2f"),
            _number(result.static_bytes / MIB, ".1f"),
        )
    return shown


def floor_table(results: Sequence[Result], title: str) -> Table | None:
    """Return the shares of the floor by phase; None where no contestant has one."""
    found = [result for result in results if result.floor is not None]
    if not found:
        return None
    rates = {result.dtype: result.floor.rates for result in found if result.floor is not None}
    shown = Table(title=title, title_justify="left", caption_justify="left")
    reached = "; ".join(
        f"{dtype}: " + ", ".join(f"{name} {rate / GIGA:.1f}" for name, rate in by_kernel.items())
        for dtype, by_kernel in rates.items()
    )
    shown.caption = f"floor/taken: at the rate of {TORCH_MATMUL}, and at the best kernel's.\nG multiply-adds/s: {reached}"
    for column in ("contestant", "phase", "G mult.-adds", "s taken", "floor/taken", "best kernel"):
        shown.add_column(column, justify="left" if column in ("contestant", "phase") else "right", no_wrap=True)
    for result in found:
        assert result.floor is not None
        assert result.phase_seconds is not None
        work = {**result.floor.multiply_adds, "whole": sum(result.floor.multiply_adds.values())}
        seconds = {**result.phase_seconds, "whole": sum(result.phase_seconds.values())}
        for phase in (*PHASES, "whole"):
            shown.add_row(
                result.name if phase == PHASES[0] else "",
                phase,
                f"{work[phase] / GIGA:,.2f}",
                f"{seconds[phase]:.3f}",
                f"{result.floor.share_torch_matmul[phase]:.0%}",
                f"{result.floor.share_best_kernel[phase]:.0%}",
            )
    return shown


def write(results: Sequence[Result], path: Path) -> None:
    """Write the results as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
