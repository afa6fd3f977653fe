"""What a page shows of a run, read from its folder; a run that is being written now can be read too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hydra_ppo.config.paths import read_settings
from hydra_ppo.config.reading import settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.report.charts import Chart, Line
from hydra_ppo.runs.contents import CONFIG, SAMPLES
from hydra_ppo.runs.inspect import inspect_run, read_summary
from hydra_ppo.runs.plots import MEMORY_METRIC, PHASES, read_metrics, read_records
from hydra_ppo.runs.series import series_of

CONFIGS: Mapping[str, type] = {"sft": SFTConfig, "ppo": PPOConfig}

HELD_OUT = "held-out"
PANELS: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Score", "mean per response", {"objective/scores": "rollout", "eval/scores": HELD_OUT}),
    ("Independent judge", "mean per response", {"eval/independent": HELD_OUT}),
    ("KL from the reference", "nats per response", {"objective/kl": "rollout", "eval/kl": HELD_OUT}),
    ("Response length", "tokens", {"rollout/response_length": "rollout", "eval/response_length": HELD_OUT}),
    ("Entropy", "nats per token", {"policy/entropy": "actor"}),
    ("Explained variance of the critic", "1 is all", {"value/explained_variance": "critic"}),
    ("Share of clipped tokens", "0 to 1", {"policy/clip_frac": "actor", "value/clip_frac": "critic"}),
    ("Cut at the longest length", "share of responses", {"rollout/truncated": "rollout", "eval/truncated": HELD_OUT}),
    ("Distinct bigrams", "share of all", {"rollout/distinct_2": "rollout"}),
    ("Spread of the reward heads", "score", {"reward/head/spread": "rollout"}),
    ("Actor's loss", "per token", {"policy/loss": "actor"}),
    ("Critic's loss", "per token", {"value/loss": "critic"}),
    ("Pairs ranked correctly", "0.5 is chance", {"train/reward_accuracy": "batch", "eval/reward_accuracy": HELD_OUT}),
    ("Loss of the language model", "nats per token", {"loss/sft": "batch"}),
    ("Loss of the reward model", "nats per pair", {"loss/reward": "batch"}),
    ("Perplexity", "of chosen responses", {"eval/perplexity": HELD_OUT}),
    ("Calibration error of the reward model", "0 is best", {"eval/reward_ece": HELD_OUT}),
    ("Practised answers", "nats per token", {"practice/ptx_nll": "ptx", "practice/rehearsal_nll": "rehearsal"}),
    ("Speed", "tokens per second", {"time/tokens_per_second": "all phases"}),
)
"""Title, unit, and what the legend says of each metric."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; None where there is no score.

    Attributes:
        before, after: texts.
        scores: of both, None where one was not scored.
    """

    prompt: str
    before: str
    after: str
    scores: tuple[float | None, float | None]


@dataclass(frozen=True)
class Gathered:
    """What a run's folder says.

    Attributes:
        name: the folder, as it was named.
        label: what the page calls the run.
        found: of `inspect_run`.
        records: of metrics.jsonl.
        summary: of summary.json; empty before the run is at its end.
        settings: all of them by full name; None where they cannot be read.
        changed: name, value and default of each that is not the default.
        pairs: answers before and after; from which steps `pair_steps` says.
        samples: where there are no such pairs: recorded samples of the last step that has some.
    """

    name: str
    label: str
    found: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    changed: Sequence[tuple[str, Any, Any]]
    pairs: Sequence[Pair]
    pair_steps: tuple[Any, Any] | None
    samples: Sequence[Mapping[str, Any]]


def gather_all(folders: Sequence[Path]) -> list[Gathered]:
    """Read the folders of some runs, each labelled by what of its name the others do not share.

    Raises:
        ConfigError: where a folder holds no run, or one is named twice.
        DataError: as of `gather`.
    """
    names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError("runs: one of them is named twice; name each once.")
    return [gather(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names without the parts that all begin with, but the last of each."""
    if len(folders) < 2:
        return [str(folder) for folder in folders]
    parts = [folder.parts for folder in folders]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    return [str(Path(*one[shared:])) for one in parts]


def gather(folder: Path, label: str) -> Gathered:
    """Read a run's folder.

    Raises:
        ConfigError: where it is missing or holds no run.
        DataError: where a line of its files, not the last, is broken.
    """
    found = inspect_run(folder)
    settings = _settings(Path(found["folder"]) / CONFIG)
    command = CONFIGS.get(str(found["command"]))
    changed = []
    if command is not None and settings is not None:
        known = settings_of(command).values()
        defaults = {setting.name: None if setting.required else _plain(setting.default) for setting in known}
        settings = defaults | settings  # what an older version did not know was as it is by default now
        changed = [(name, settings[name], default) for name, default in defaults.items() if settings[name] != default]
    rows = [row for row in read_records(Path(found["folder"]) / SAMPLES) if isinstance(row.get("response"), str)]
    pairs, steps = before_and_after(rows)
    last = max((row["step"] for row in rows if _is_number(row.get("step"))), default=None)
    samples = [] if pairs else [row for row in rows if row.get("step") == last]
    records, summary = read_metrics(Path(found["folder"])), read_summary(Path(found["folder"]))
    return Gathered(str(folder), label, found, records, summary, settings, changed, pairs, steps, samples)


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        content = read_settings(path)
    except ConfigError:
        return None
    return dict(_flat(content, ""))


def _plain(value: Any) -> Any:
    """Return a default as YAML has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flat(node: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in node.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(prefix + str(name), value)]
    return found


def before_and_after(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Pair], tuple[Any, Any] | None]:
    """Pair the answers to held-out prompts of the first evaluation with those of the last, by prompt and place.

    Returns:
        The pairs and both steps; none where there are no two evaluations.
    """
    held = [row for row in rows if row.get("held_out") and _is_number(row.get("step"))]
    steps = sorted({row["step"] for row in held})
    if len(steps) < 2:
        return [], None
    first, last = (_numbered(held, step) for step in (steps[0], steps[-1]))
    pairs = [
        Pair(str(row.get("prompt")), row["response"], last[key]["response"], (_score(row), _score(last[key])))
        for key, row in first.items()
        if key in last
    ]
    return pairs, (steps[0], steps[-1])


def _numbered(rows: Sequence[Mapping[str, Any]], step: Any) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Return the rows of a step by their prompt and how many of that prompt came before."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in rows:
        if row["step"] == step:
            prompt = str(row.get("prompt"))
            found[prompt, sum(other == prompt for other, _ in found)] = row
    return found


def _score(row: Mapping[str, Any]) -> float | None:
    value = row.get("score")
    return value if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def charts(runs: Sequence[Gathered]) -> list[Chart]:
    """Return the charts of what was measured. One run: a colour for each metric; several: a colour for each run."""
    found = []
    for title, unit, names in PANELS:
        lines = []
        for number, run in enumerate(runs):
            for place, (name, label) in enumerate(names.items()):
                steps, values = series_of(run.records, name)
                if steps:
                    said = label if len(runs) == 1 else f"{run.label}, {label}" if len(names) > 1 else run.label
                    colour = place if len(runs) == 1 else number
                    lines.append(Line(said, steps, values, colour, label == HELD_OUT))
        if lines:
            alarms = runs[0].found["alarms"] if len(runs) == 1 else []
            found.append(Chart(title, unit, lines, [alarm["step"] for alarm in alarms if _is_number(alarm.get("step"))]))
    return found


def differing(runs: Sequence[Gathered]) -> list[tuple[str, list[str]]]:
    """Return the settings that the runs do not share, but for the folder that they are written to, each with its values."""
    named = dict.fromkeys(name for run in runs for name in (run.settings or {}))
    rows = [(name, [value_text((run.settings or {}).get(name)) for run in runs]) for name in named if name != "run.output"]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def value_text(value: Any) -> str:
    """Write a setting's value: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def memory_peaks(run: Gathered) -> list[tuple[str, float]]:
    """Return the highest measured peak of each phase in bytes, in the order of a step."""
    named = (match[1] for record in run.records for name in record if (match := MEMORY_METRIC.fullmatch(name)))
    peaks = ((phase, series_of(run.records, f"memory/{phase}_peak_bytes")[1]) for phase in dict.fromkeys([*PHASES, *named]))
    return [(phase, max(values)) for phase, values in peaks if values]
