"""Pictures of what a PPO run watches itself for: all of it over the steps, and the score over how far the policy has gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_ppo.runs.series import series_of

PROXY, JUDGE, QUIET = "#1f5a96", "#d1702a", "#9db4cc"
MARK = {"color": "#b02a2a", "linestyle": (0, (4, 3)), "linewidth": 0.8, "alpha": 0.8}

Records = Sequence[Mapping[str, Any]]

PANELS = (
    ("score", "score", {"objective/scores": "rollout", "eval/scores": "held-out"}),
    ("evaluator", "eval_rewards", {"eval/independent": "held-out"}),
    ("KL from the reference", "nats per response", {"objective/kl": "rollout", "eval/kl": "held-out"}),
    ("response length", "tokens", {"rollout/response_length": "rollout", "eval/response_length": "held-out"}),
    ("distinct-2", "share of bigrams", {"rollout/distinct_2": "rollout"}),
    ("cut at the longest length", "share of answers", {"rollout/truncated": "rollout", "eval/truncated": "held-out"}),
    ("spread of the ensemble", "score", {"reward/head/spread": "rollout"}),
)
"""Title, unit and metrics of each panel, with what their legend says."""
OWN = ("eval/independent", "rollout/distinct_2", "rollout/truncated", "reward/head/spread")
"""Metrics of which one must be there: the others have pictures of their own."""


def draw_monitor(records: Records, alarms: Records, path: Path) -> Path | None:
    """Draw score, evaluator, KL, length, distinct-2, cut answers and spread over the same steps, with alarms as marks.

    Args:
        records: of ``metrics.jsonl``.
        alarms: of ``alarms.jsonl``.

    Returns:
        `path`; None where nothing of it was measured.
    """
    if not any(series_of(records, name)[0] for name in OWN):
        return None
    panels = []
    for title, unit, lines in PANELS:
        found = {label: series_of(records, name) for name, label in lines.items()}
        if found := {label: points for label, points in found.items() if points[0]}:
            panels.append((title, unit, found))
    figure = _figure(7.2, 0.9 + 1.35 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, unit, found) in zip(rows, panels, strict=True):
        for label, (steps, values) in found.items():
            held_out = label == "held-out"
            colour = JUDGE if title == "evaluator" else PROXY if held_out or len(found) == 1 else QUIET
            marker = "o" if held_out and len(steps) <= 60 else None
            axes.plot(steps, values, color=colour, label=label, linewidth=1.5 if held_out else 1.2, marker=marker, markersize=3)
        _tidy(axes)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylabel(unit, fontsize=8)
        if len(found) > 1:
            axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0)
        for steps in _marks(alarms).values():
            for step in steps:
                axes.axvline(step, **MARK)
    _whole_steps(rows[-1])
    rows[-1].set_xlabel("step", fontsize=9)
    if alarms:
        figure.suptitle("dashed: " + "; ".join(_said(alarms)), fontsize=8, x=0.01, ha="left", color=MARK["color"])
    return _save(figure, path)


def draw_over_optimisation(records: Records, alarms: Records, path: Path) -> Path | None:
    """Draw held-out score and evaluator over the root of the KL from the reference, in the order of the steps.

    Gao et al. 2022 (arXiv 2210.10760) measure how far a policy has gone by that root: the score goes on rising with it where
    what was meant has turned.

    Args:
        records: of ``metrics.jsonl``.
        alarms: of ``alarms.jsonl``; those of the score and the evaluator are marked.

    Returns:
        `path`; None without an evaluator.
    """
    names = ("eval/kl", "eval/scores", "eval/independent")
    points = [record for record in records if all(_is_number(record.get(name)) for name in names)]
    if not points:
        return None
    away = {record.get("step"): math.sqrt(max(record["eval/kl"], 0.0)) for record in points}
    figure = _figure(6.8, 3.9)
    axes = figure.subplots()
    other = axes.twinx()
    handles = []
    for place, name, label, colour in ((axes, names[1], "score", PROXY), (other, names[2], "evaluator", JUDGE)):
        values = [record[name] for record in points]
        place.plot(list(away.values()), values, color=colour, linewidth=1.0, alpha=0.4)  # the order of the steps
        handles += place.plot(list(away.values()), values, "o", color=colour, markersize=4, label=label)
        place.set_ylabel(f"{label}, held-out mean", color=colour, fontsize=9)
        place.tick_params(axis="y", colors=colour, labelsize=8)
        place.margins(y=0.12)
    last = points[-1]
    for record, text in ((points[0], "before"), (last, f"step {last.get('step')}")):
        axes.annotate(
            text, (away[record.get("step")], record[names[1]]), (0, 7), textcoords="offset points", fontsize=7.5, ha="center"
        )
    marked = [alarm for alarm in alarms if alarm.get("name") == "over_optimisation" and alarm.get("step") in away]
    for alarm in marked:
        axes.axvline(away[alarm["step"]], **MARK)
    if marked:
        text = "alarm at step " + ", ".join(f"{alarm['step']:g}" for alarm in marked[:5]) + (", ..." if len(marked) > 5 else "")
        axes.plot([], [], **MARK, label=text)
        handles.append(axes.lines[-1])
    axes.set_xlabel("root of the KL from the reference (nats per response)", fontsize=9)
    axes.set_title("Over-optimisation: what training raises, and what it should", loc="left", fontsize=10.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for place in (axes, other):
        place.spines["top"].set_visible(False)
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles), frameon=False)  # over no point
    return _save(figure, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _marks(alarms: Records) -> dict[str, list[float]]:
    """Return the steps of each alarm."""
    found: dict[str, list[float]] = {}
    for alarm in alarms:
        if _is_number(alarm.get("step")):
            found.setdefault(str(alarm.get("name")), []).append(alarm["step"])
    return found


def _said(alarms: Records) -> list[str]:
    """Return each alarm with its steps, the first few of them."""
    return [
        f"{name} at {', '.join(f'{step:g}' for step in steps[:5])}" + (", ..." if len(steps) > 5 else "")
        for name, steps in _marks(alarms).items()
    ]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.15)


def _whole_steps(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
