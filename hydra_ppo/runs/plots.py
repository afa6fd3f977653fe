"""Pictures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ppo.errors import DataError
from hydra_ppo.runs.contents import ALARMS, METRICS
from hydra_ppo.runs.series import series_of
from hydra_ppo.runs.watch_plots import draw_monitor, draw_over_optimisation

MIB = 2**20
MEMORY_METRIC = re.compile(r"memory/(.+)_peak_bytes")
PHASES = ("rollout", "score", "update-actor", "update-critic", "optimizer")
ROUND = [1, 2, 5, 10]
"""Ticks are these times powers of ten apart."""
COLOURS = ("#1f5a96", "#d1702a", "#3f8f5f", "#8a5aa8")


@dataclass(frozen=True)
class LinePlot:
    """One picture of metrics over steps; ``lines`` maps a metric to its legend, ``panels`` gives each axes of its own."""

    file: str
    title: str
    y_label: str
    lines: Mapping[str, str]
    limits: tuple[float, float] | None = None
    panels: bool = False


LINE_PLOTS = (
    LinePlot(
        "reward.png",
        "Score and KL-penalised reward",
        "mean per response",
        {
            "objective/scores": "score",
            "objective/rlhf_reward": "score minus KL penalty",
            "eval/scores": "score on held-out prompts",
        },
    ),
    LinePlot(
        "kl.png", "KL from the reference", "nats per response", {"objective/kl": "rollouts", "eval/kl": "held-out prompts"}
    ),
    LinePlot(
        "length.png",
        "Response length",
        "tokens per response",
        {"rollout/response_length": "rollouts", "eval/response_length": "held-out prompts"},
    ),
    LinePlot(
        "loss.png",
        "Training loss",
        "loss",
        {
            "loss/sft": "cross-entropy per token (nats)",
            "loss/reward": "ranking loss per pair (nats)",
            "loss/total": "both, as weighted",
            "eval/loss": "both, on held-out pairs",
            "policy/loss": "policy",
            "value/loss": "value",
        },
        panels=True,
    ),
    LinePlot("perplexity.png", "Held-out perplexity", "perplexity of chosen responses", {"eval/perplexity": "held-out"}),
    LinePlot(
        "pair_accuracy.png",
        "Pairs ranked correctly",
        "share of pairs (0.5 is chance)",
        {"train/reward_accuracy": "training batch", "eval/reward_accuracy": "held-out"},
        limits=(0.0, 1.02),
    ),
)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``; a last line cut short by a crash is left out.

    Raises:
        DataError: A line in the middle is not a JSON object.
    """
    return _read(Path(folder) / METRICS)


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``alarms.jsonl``, as `read_metrics` does; none where no alarm was raised."""
    return _read(Path(folder) / ALARMS)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # Not `splitlines`: a text in a line may hold what else that takes for an end, such as U+2028.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise DataError(f"{path}, line {number}: not a JSON object; remove the line.")
    return records


def plot_run(folder: Path) -> list[Path]:
    """Draw the plots of a run under ``folder/plots`` and return the PNG files written.

    A plot whose metrics were never measured is left out; a value that was not measured is skipped.
    """
    folder = Path(folder)
    records = read_metrics(folder)
    written = []
    for plot in LINE_PLOTS:
        series = {label: series_of(records, name) for name, label in plot.lines.items()}
        series = {label: points for label, points in series.items() if points[0]}
        if series:
            written.append(_draw_lines(folder / "plots" / plot.file, plot, series))
    found = (match[1] for record in records for name in record if (match := MEMORY_METRIC.fullmatch(name)))
    phases = dict.fromkeys([*PHASES, *found])  # in the order of a PPO step, then others such as sft's
    peaks = {phase: max(series_of(records, f"memory/{phase}_peak_bytes")[1], default=None) for phase in phases}
    measured = {phase: peak / MIB for phase, peak in peaks.items() if peak is not None}
    if measured:
        written.append(_draw_memory(folder / "plots" / "memory.png", measured))
    alarms = read_alarms(folder)
    drawn = (
        draw_monitor(records, alarms, folder / "plots" / "monitor.png"),
        draw_over_optimisation(records, alarms, folder / "plots" / "over_optimisation.png"),
    )
    return written + [path for path in drawn if path is not None]


def _figure(height: float = 3.6, panels: int = 1) -> tuple[Any, Any]:
    # The Figure class draws without pyplot, whose backend and state belong to the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    return figure, rows


def _draw_lines(path: Path, plot: LinePlot, series: Mapping[str, tuple[list[float], list[float]]]) -> Path:
    from matplotlib.ticker import MaxNLocator

    apart = [{label: points} for label, points in series.items()] if plot.panels else [series]
    figure, rows = _figure(3.6 if len(apart) == 1 else 0.7 + 1.6 * len(apart), len(apart))
    for axes, lines in zip(rows, apart, strict=True):
        for colour, (label, (steps, values)) in zip(COLOURS, lines.items(), strict=False):
            marker = "o" if len(steps) <= 25 else None
            axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3.5)
        axes.set_ylabel(plot.y_label)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if plot.limits:
            axes.set_ylim(*plot.limits)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        if len(apart) > 1:
            axes.set_title(next(iter(lines)), loc="left", fontsize=9)
    if len(apart) > 1:
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=11)
    else:
        rows[0].set_title(plot.title, loc="left", fontsize=11)
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=ROUND))
    return _save(figure, path)


def _draw_memory(path: Path, peaks: Mapping[str, float]) -> Path:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(height=0.9 + 0.45 * len(peaks))
    name, unit = ("GiB", 1024.0) if max(peaks.values()) >= 1024 else ("MiB", 1.0)
    sizes = [peak / unit for peak in peaks.values()]
    bars = axes.barh(range(len(peaks)), sizes, color=COLOURS[0], height=0.6)
    axes.bar_label(bars, labels=[f"{size:,.0f}" if size >= 100 else f"{size:.3g}" for size in sizes], padding=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    axes.set_yticks(range(len(peaks)), list(peaks))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title("Peak memory by phase, highest of the measured steps", loc="left", fontsize=11)
    axes.set_xlabel(name)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
