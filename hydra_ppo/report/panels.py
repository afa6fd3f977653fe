"""Which charts a page has, and of which metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_ppo.report.charts import Line, bar_chart, line_chart
from hydra_ppo.report.record import RunRecord, is_number

MEMORY = re.compile(r"memory/(.+)_peak_bytes")


@dataclass(frozen=True)
class Panel:
    """A chart: its title, its unit, and its metrics with what the legend calls them; the second kind is drawn dashed."""

    title: str
    unit: str
    metrics: dict[str, str]
    limits: tuple[float, float] | None = None


TRAINING, HELD_OUT = "rollouts", "held-out"
PANELS = (
    Panel("Score", "mean per response", {"objective/scores": TRAINING, "eval/scores": HELD_OUT}),
    Panel("Independent evaluator", "mean per response", {"eval/independent": HELD_OUT}),
    Panel("KL from the reference", "nats per response", {"objective/kl": TRAINING, "eval/kl": HELD_OUT}),
    Panel("Length", "tokens per response", {"rollout/response_length": TRAINING, "eval/response_length": HELD_OUT}),
    Panel("Entropy", "nats per token", {"policy/entropy": TRAINING}),
    Panel("Explained variance", "of the returns, by the critic", {"value/explained_variance": TRAINING}),
    Panel("Clip share", "of the tokens", {"policy/clip_frac": "policy", "value/clip_frac": "value"}),
    Panel("Policy loss", "", {"policy/loss": TRAINING}),
    Panel("Value loss", "", {"value/loss": TRAINING}),
    Panel("Answers that end", "share", {"rollout/eos_rate": TRAINING, "eval/eos_rate": HELD_OUT}, (0.0, 1.0)),
    Panel("Repeated 4-grams", "share", {"rollout/repeated_4grams": TRAINING, "eval/repeated_4grams": HELD_OUT}),
    Panel("Speed", "tokens per second", {"time/tokens_per_second": TRAINING}),
    Panel("Cross-entropy", "nats per token", {"loss/sft": "training"}),
    Panel("Ranking loss", "nats per pair", {"loss/reward": "training"}),
    Panel("Held-out loss", "as weighted", {"eval/loss": HELD_OUT}),
    Panel("Perplexity", "of chosen responses", {"eval/perplexity": HELD_OUT}),
    Panel(
        "Pairs ranked correctly",
        "share, 0.5 is chance",
        {"train/reward_accuracy": "training", "eval/reward_accuracy": HELD_OUT},
        (0.0, 1.0),
    ),
    Panel("Calibration error", "of pair probabilities", {"eval/reward_ece": HELD_OUT}),
    Panel("Learning rate", "", {"lr": TRAINING}),
)


def charts_html(runs: Sequence[RunRecord]) -> str:
    """Return every chart that some run has a point for; colours tell runs apart, or the metrics of one."""
    marks: dict[float, str] = {}
    for run in runs:
        for alarm in run.alarms:
            step, name = alarm["step"], str(alarm.get("name"))
            said = f"alarm at step {step:g}: {name}" + (f", {run.label}" if len(runs) > 1 else "")
            marks[step] = f"{marks[step]}; {said}" if step in marks else said
    drawn = [
        line_chart(panel.title, panel.unit, panel_lines(panel, runs), marks=marks, limits=panel.limits) for panel in PANELS
    ]
    return "".join([*drawn, _memory(runs)])


def panel_lines(panel: Panel, runs: Sequence[RunRecord]) -> list[Line]:
    """Return the lines of a chart: of one run a colour each; of several a colour for each run, the second metric dashed."""
    lines = []
    for number, run in enumerate(runs):
        for place, (metric, name) in enumerate(panel.metrics.items()):
            steps, values = run.series(metric)
            colour = number if len(runs) > 1 else place
            label = name if len(runs) == 1 else run.label if place == 0 else f"{run.label} {name}"
            kind = name if len(runs) > 1 and len(panel.metrics) > 1 else ""
            if steps:
                lines.append(Line(label, steps, values, colour, place > 0 and len(runs) > 1, kind))
    return lines


def _memory(runs: Sequence[RunRecord]) -> str:
    rows = []
    for number, run in enumerate(runs):
        names = dict.fromkeys(found[1] for record in run.records for name in record if (found := MEMORY.fullmatch(name)))
        for name in names:
            if values := run.series(f"memory/{name}_peak_bytes")[1]:
                rows.append((name, run.label if len(runs) > 1 else "", max(values), number))
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    cards = {card_of(run) for run in runs}
    card = cards.pop() if len(cards) == 1 else None  # a mark for some of the runs would be read as one for all
    return bar_chart("Memory by phase, the highest of the measured steps", rows, card)


def card_of(run: RunRecord) -> tuple[str, float] | None:
    """Return name and bytes of the card that a run was on; None on a CPU, and where an older version did not say."""
    device: Any = run.state.get("device")
    if not isinstance(device, dict) or not is_number(device.get("bytes")) or device["bytes"] <= 0:
        return None
    return str(device.get("name")), float(device["bytes"])
