"""What a page shows of a run, read from its folder; what is missing, half written or not a number is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from hydra_ppo.config.paths import read_settings
from hydra_ppo.config.reading import item_class, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import CONFIG, SUMMARY
from hydra_ppo.runs.folder import read_state
from hydra_ppo.runs.inspect import inspect_run
from hydra_ppo.runs.plots import read_metrics
from hydra_ppo.runs.series import series_of

CONFIGS: Mapping[str, type] = {"ppo": PPOConfig, "sft": SFTConfig}
ELSEWHERE = ("run.output", "run.overwrite")
"""Settings that say where and how, not what: every run has its own."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        folder: as it was named.
        label: a short name, unlike those of the runs beside it.
        info: of `inspect_run`.
        state: of ``state.json``.
        records: of ``metrics.jsonl``.
        summary: of ``summary.json``, empty while the run goes on.
        settings: by full name; empty where ``config.yaml`` cannot be read.
    """

    folder: Path
    label: str
    info: Mapping[str, Any]
    state: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Name of what ran, such as ppo."""
        return str(self.info["command"])

    @property
    def alarms(self) -> Sequence[Mapping[str, Any]]:
        """Records of ``alarms.jsonl``."""
        return [alarm for alarm in self.info["alarms"] if is_number(alarm.get("step"))]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric where both are numbers."""
        points = [(s, v) for s, v in zip(*series_of(self.records, name), strict=True) if math.isfinite(s)]
        return [step for step, _ in points], [value for _, value in points]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read some run folders.

    Raises:
        ConfigError: one is missing or holds no run, or is named twice.
        DataError: a line in the middle of its metrics is broken.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (same := seen.setdefault(folder.resolve(), folder)) is not folder:
            raise ConfigError(f"{folder} is the same run as {same}; name each run once.")
    return [_read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the end of each path, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max((len(path) for path in parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, label: str) -> RunRecord:
    info = inspect_run(folder)
    return RunRecord(
        folder,
        label,
        info,
        read_state(folder) or {},
        read_metrics(folder),
        _summary(folder / SUMMARY),
        _settings(folder / CONFIG),
    )


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(_flat(read_settings(path)))
    except ConfigError:
        return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, value and default of each setting that is not at its default; "required" where there is none."""
    known = settings_of(CONFIGS[run.command]) if run.command in CONFIGS else {}
    found = []
    for name, value in run.settings.items():
        if name in ELSEWHERE:
            continue
        inside = next((whole for whole in known if name.startswith(f"{whole}.")), None)  # an entry of a mapping
        if name not in known:
            found.append((name, show(value), "empty" if inside else "not a setting of this version" if known else ""))
        elif known[name].default is MISSING:
            found.append((name, show(value), "required"))
        else:
            item = item_class(known[name].hint)
            now, default = (show(_short(listed, item)) for listed in (value, known[name].default))
            if now != default:
                found.append((name, now, default))
    return found


def _short(value: Any, item: type | None) -> Any:
    """Return a list of groups with what is not at its default; the first field of each stays, it says what it is."""
    if item is None or not isinstance(value, list):
        return value
    plain = [asdict(one) if is_dataclass(one) and not isinstance(one, type) else one for one in value]
    own = settings_of(item)
    first = next(iter(own))
    return [
        {name: v for name, v in one.items() if name == first or name not in own or own[name].default != v}
        if isinstance(one, Mapping)
        else one
        for one in plain
    ]


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return name and values of each setting that some runs have otherwise than others; "-" where one lacks it."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ELSEWHERE)
    rows = [(name, *(show(run.settings[name]) if name in run.settings else "-" for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def show(value: Any) -> str:
    """Return a value of a setting as one reads it, 1e-05 and 1.0e-05 alike."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {show(inner)}" for key, inner in value.items()) or "{}"
    if isinstance(value, list):
        return "; ".join(map(show, value)) or "[]"
    return str(value)


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
