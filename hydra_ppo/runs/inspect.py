"""Say what a run folder holds: state, settings, last metrics, checkpoints."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.config.paths import read_settings
from hydra_ppo.data.sources import exists, local_path
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import ALARMS, CONFIG, LOG, METRICS, REPORT, SAMPLES, STATE, SUMMARY
from hydra_ppo.runs.folder import has_died, read_state
from hydra_ppo.runs.outcomes import outcomes
from hydra_ppo.runs.plots import read_alarms, read_metrics
from hydra_ppo.runtime.tables import print_table

MIB = 2**20
FILES = {
    SUMMARY: "the result",
    METRICS: "every number",
    SAMPLES: "answers",
    ALARMS: "alarms",
    REPORT: "the page",
    CONFIG: "settings",
    LOG: "what was printed",
}
"""What there is to read in a run's folder, and what it holds."""
HIGHLIGHTS = (
    *("model.name_or_path", "model.quantization", "model.trunk_layers", "model.lora.r", "data.train"),
    *(
        "method",
        "adapter",
        "reward_heads",
        "reward_loss",
        "floor_share",
        "floor_steps",
        "epochs",
        "steps",
        "batch_size",
        "rollout.batch_size",
        "rollout.max_new_tokens",
    ),
    *("minibatch_size", "microbatch_size", "optimizer.learning_rate", "kl.coef", "run.seed"),
)
EVALUATED = ("eval/perplexity", "eval/reward_accuracy", "eval/reward_ece")
EXPECTED = {
    "ppo": (
        *("objective/scores", "objective/rlhf_reward", "objective/kl", "objective/entropy", "policy/clip_frac"),
        *("value/explained_variance", "rollout/response_length", "rollout/eos_rate", "time/tokens_per_second"),
        *("memory/rollout_peak_bytes", "memory/score_peak_bytes", "memory/update-actor_peak_bytes"),
        *("memory/update-critic_peak_bytes", "memory/optimizer_peak_bytes", "eval/scores"),
    ),
    "sft": ("loss/total", "loss/sft", "loss/reward", "train/reward_accuracy", *EVALUATED),
}


def inspect_run(folder: Path) -> dict[str, Any]:
    """Return state, settings, last metrics and checkpoints of a run; None stands for what was not measured.

    Raises:
        ConfigError: The folder is missing or holds no run.
    """
    folder = local_path(str(folder))
    if not exists(folder) or not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; name a run folder.")
    state = read_state(folder)
    if state is None:
        what = f"a broken {STATE}" if (folder / STATE).exists() else f"no {STATE}"
        raise ConfigError(f"{folder} holds {what}, so it is not a run; name a folder that sft, ppo or quickstart wrote.")
    records = read_metrics(folder)
    verdict, error = state.get("state"), state.get("error")
    if has_died(folder, state):
        verdict, error = "interrupted", f"process {state.get('pid')} is gone"
    command = state.get("command")
    # A metric that this kind of run logs but this run has not measured is shown, as null.
    metrics: dict[str, dict[str, Any]] = {name: {"value": None, "step": None} for name in EXPECTED.get(str(command), ())}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time"):
                metrics[name] = {"value": value, "step": record.get("step")}
    return {
        "folder": str(folder),
        "command": command,
        "state": verdict,
        "error": error,
        "started": state.get("started"),
        "finished": state.get("finished"),
        "version": state.get("version"),
        "packages": state.get("packages"),
        "device": state.get("device"),
        "config": _highlights(folder / CONFIG),
        "last_step": records[-1].get("step") if records else None,
        "metrics": metrics,
        "outcomes": [asdict(found) | {"gain": found.gain} for found in outcomes(records, read_summary(folder))],
        "files": [name for name in FILES if (folder / name).is_file()],
        "alarms": read_alarms(folder),
        "checkpoints": [
            {"name": path.name, "bytes": _size(path)}
            for path in sorted((folder / "checkpoints").glob("*"), key=_order)
            if not path.name.startswith(".")  # one that is still being written
        ],
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what the run wrote at its end; nothing where it is not there, or broken."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def print_inspection(report: dict[str, Any], console: Console | None = None) -> None:
    """Print what ``inspect_run`` found; "-" stands for what was not measured."""
    console = console or Console()
    title = Text(f"{report['folder']}: {report['command']}, {report['state']}")  # a folder's name is no markup
    state = Table(title=title, title_justify="left", show_header=False)
    for name in ("error", "started", "finished", "version", "last_step"):
        state.add_row(name, Text(_show(report[name])))
    for name, value in (report["config"] or {}).items():
        state.add_row(name, Text(_show(value)))
    print_table(console, state)
    if report["outcomes"]:
        print_table(console, _outcomes(report["outcomes"]))
    metrics = Table(title="Last metrics", title_justify="left")
    metrics.add_column("metric")
    metrics.add_column("value", justify="right")
    metrics.add_column("step", justify="right")
    for name, entry in report["metrics"].items():
        metrics.add_row(*_metric(name, entry["value"]), _show(entry["step"]))
    print_table(console, metrics)
    if report["alarms"]:
        alarms = Table(title="Alarms", title_justify="left")
        alarms.add_column("step", justify="right")
        alarms.add_column("alarm")
        alarms.add_column("what was seen, and what to do", overflow="fold")
        for alarm in report["alarms"]:
            alarms.add_row(_show(alarm.get("step")), Text(_show(alarm.get("name"))), Text(_show(alarm.get("line"))))
        print_table(console, alarms)
    checkpoints = Table(title="Checkpoints", title_justify="left")
    checkpoints.add_column("name")
    checkpoints.add_column("MiB", justify="right")
    for checkpoint in report["checkpoints"]:
        checkpoints.add_row(Text(checkpoint["name"]), f"{checkpoint['bytes'] / MIB:,.1f}")
    if report["checkpoints"]:
        print_table(console, checkpoints)
    else:
        console.print("No checkpoints.")
    console.print(Text("Files: " + "; ".join(f"{name}, {FILES[name]}" for name in report["files"])))


def _outcomes(found: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the first and the last evaluation on held-out rows."""
    table = Table(title="Held-out evaluation", title_justify="left")
    table.add_column("what", overflow="fold")
    for name in ("before", "after", "gain"):
        table.add_column(name, justify="right")
    table.add_column("steps")
    for one in found:
        before, after = (_show(float(value)) for value in one["values"])
        steps = [f"{step:g}" for step in one["steps"]]
        error = "" if one["error"] is None else f" ± {_show(float(one['error']))}"
        if one["gain"] is None:
            table.add_row(one["label"], "-", after, "-", steps[1])
        else:
            table.add_row(one["label"], before, after, _show(one["gain"]) + error, " to ".join(steps))
    return table


def _metric(name: str, value: Any) -> tuple[str, str]:
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes") + " (MiB)", "-" if value is None else f"{value / MIB:,.1f}"
    return name, _show(value)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _highlights(path: Path) -> dict[str, Any] | None:
    """Return the settings worth a line, by full name; None where the file is missing or broken."""
    try:
        content = read_settings(path)
    except ConfigError:
        return None
    found = {}
    for name in HIGHLIGHTS:
        node: Any = content
        for part in name.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            found[name] = node
    return found


_ABSENT = object()


def _order(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.name if c.isdigit())
    return int(digits or 0), path.name


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for place, _, names in os.walk(path):  # passes over a folder that the run removes meanwhile
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(place, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total
