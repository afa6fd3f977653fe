"""The run folder: settings, metrics, samples, state and log of one training run.

::

    config.yaml     every setting; loads back as a config
    metrics.jsonl   one object per logged step: step, time (seconds since the epoch), metrics (null: not measured)
    samples.jsonl   one object per recorded sample: step and what the trainer gives
    state.json      command, state (running, finished, failed, interrupted), pid, times, versions, error
    log.txt         what was printed
    summary.json    written last, by ``finish``
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hydra_ppo import __version__
from hydra_ppo.config import PPOConfig, RunSettings, SFTConfig
from hydra_ppo.config_io import as_values, render_yaml
from hydra_ppo.errors import ConfigError

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"
STATE, LOG, SUMMARY = "state.json", "log.txt", "summary.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}

WRITTEN_FILES = (
    *(CONFIG, METRICS, SAMPLES, STATE, LOG, SUMMARY),
    *("hydra.json", "heads.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
WRITTEN_FOLDERS = ("sft", "reward", "actor", "critic", "base", "checkpoints", "plots", "tensorboard", "wandb")
SAMPLE_ROWS_SHOWN = 4


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return ``state.json`` of a run folder, or None where there is none or it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def is_alive(state: Mapping[str, Any]) -> bool | None:
    """Say whether the process that wrote ``state`` still runs; None where it ran on another machine."""
    if state.get("host") != socket.gethostname():
        return None
    try:
        os.kill(int(state["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def check_output(settings: RunSettings, config: Any = None) -> Path:
    """Check that a run may be written to ``settings.output``, and change nothing.

    Raises:
        ConfigError: The folder holds a run (and ``overwrite`` is off), other files, a run in progress, or the
            model or data that this run reads; or a tracker's package is missing.
    """
    folder = Path(settings.output).expanduser()
    name = f"run.output={settings.output!r}"
    _check_trackers(settings)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{name} is a file; choose a folder.")
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(
            f"{name} cannot be made, {parent} is {'read-only' if parent.is_dir() else 'a file'}; choose another folder."
        )
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    state = read_state(folder)
    if state is None and not (folder / STATE).exists():
        raise ConfigError(f"{name} is not empty and holds no run; choose another folder.")
    verdict = (state or {}).get("state")
    if verdict == "running" and is_alive(state or {}):
        raise ConfigError(f"{name} is being written by process {(state or {}).get('pid')}; choose another folder.")
    if not settings.overwrite:
        holds = "a finished run" if verdict == "finished" else f"an unfinished run ({verdict or 'unreadable state'})"
        raise ConfigError(f"{name} holds {holds}; choose another folder or pass --run.overwrite true.")
    for setting, source in _sources(config):
        path = Path(source).expanduser()
        if path.exists() and (path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents):
            raise ConfigError(f"{name} with run.overwrite=true would delete {setting}={source!r}; choose another folder.")
    return folder


def _sources(config: Any) -> Iterator[tuple[str, str]]:
    if is_dataclass(config) and not isinstance(config, type):
        yield "model.name_or_path", config.model.name_or_path
        if base := _base_beside(Path(config.model.name_or_path)):
            yield "the base of model.name_or_path", base
        yield "data.train", config.data.train
        if config.data.eval:
            yield "data.eval", config.data.eval


def _base_beside(folder: Path) -> str | None:
    """Return the local base that a saved model of this program stands on, where it has one."""
    try:
        base = json.loads((folder / "hydra.json").read_text(encoding="utf-8"))["base"]
        return str(folder / base["name_or_path"]) if base["relative"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_trackers(settings: RunSettings) -> None:
    for tracker in settings.trackers:
        package = TRACKER_PACKAGES[tracker]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.trackers=[{tracker}] needs the package {package}, which is not installed; "
                "run pip install 'hydra-ppo[track]'."
            )


def clear(folder: Path) -> None:
    """Remove what this program writes from a run folder, and nothing else."""
    for name in (*WRITTEN_FILES, *WRITTEN_FOLDERS):
        path = folder / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir() and name in WRITTEN_FOLDERS:
            shutil.rmtree(path)


class Run:
    """An open run folder. Use as a context manager: an exception inside marks the run failed or interrupted."""

    folder: Path

    def __init__(self, folder: Path, settings: RunSettings, state: dict[str, Any], console: Console) -> None:
        """Use ``Run.create``."""
        self.folder = folder
        self._settings = settings
        self._state = state
        self._console = console
        self._trackers: list[Any] = []
        self._not_finite: set[str] = set()

    @classmethod
    def create(cls, settings: RunSettings, config: SFTConfig | PPOConfig | dict[str, Any], command: str) -> Run:
        """Make the folder and write its config and state; nothing is made or removed where a check fails.

        Args:
            settings: The run's own settings.
            config: Written to ``config.yaml``.
            command: Name of what runs, such as ``ppo``.

        Raises:
            ConfigError: See ``check_output``; also where the folder cannot be made.
        """
        folder = check_output(settings, config)
        values = config if isinstance(config, dict) else as_values(config)
        text = (
            yaml.safe_dump(config, sort_keys=False)
            if isinstance(config, dict)
            else render_yaml(type(config), values, comments=False)
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.output={settings.output!r} cannot be made ({error.strerror}); choose another.") from None
        clear(folder)
        state = {
            "command": command,
            "state": "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _now(),
            "finished": None,
            "error": None,
            "version": __version__,
            "python": sys.version.split()[0],
            "packages": {name: _version(name) for name in PACKAGES},
        }
        run = cls(folder, settings, state, Console(stderr=True))
        run._write_state()
        (folder / CONFIG).write_text(text, encoding="utf-8")
        try:
            run._start_trackers(values)
        except BaseException as error:
            run._close("failed", error)
            raise
        return run

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line to ``metrics.jsonl`` and pass the values on to the trackers.

        A value that was not measured is null. So is NaN or infinity, which JSON lacks; the first of each metric
        is noted in the log.
        """
        values = {name: self._number(step, name, value) for name, value in metrics.items()}
        self._append(METRICS, {"step": step, "time": round(time.time(), 3), **values})
        measured = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(measured, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Append ``rows`` (prompt, response, score, ...) to ``samples.jsonl`` and show the first few as a table."""
        for row in rows:
            self._append(SAMPLES, {"step": step, **row})
        if not self._settings.progress or not rows:
            return
        table = Table(title=f"Samples at step {step}", show_lines=True)
        for name in ("prompt", "response"):
            table.add_column(name, overflow="fold", ratio=1)
        table.add_column("score", justify="right")
        for row in rows[:SAMPLE_ROWS_SHOWN]:
            score = row.get("score")
            shown = f"{score:.3f}" if isinstance(score, float) else "-" if score is None else str(score)
            table.add_row(Text(_shorten(row.get("prompt"))), Text(_shorten(row.get("response"))), shown)
        self._console.print(table)

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar over ``total`` steps; yields ``advance(steps, text)``."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        with Progress(*columns, console=self._console, disable=not self._settings.progress, transient=True) as bar:
            task = bar.add_task(description, total=total, text="")

            def advance(steps: int = 1, text: str = "") -> None:
                bar.update(task, advance=steps, text=text)

            yield advance

    def note(self, text: str) -> None:
        """Write one line to the console and, with the time, to ``log.txt``."""
        line = " ".join(text.split())
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {line}\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` and mark the run finished."""
        _write_json(self.folder / SUMMARY, summary)
        self._close("finished", None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._close("interrupted", error)
        elif error is not None:
            self._close("failed", error)
        elif self._state["state"] == "running":
            self._close("failed", RuntimeError("the run ended without a summary"))

    def _number(self, step: int, name: str, value: Any) -> float | int | None:
        if value is None or isinstance(value, int):
            return value
        value = float(value)
        if math.isfinite(value):
            return value
        if name not in self._not_finite:
            self._not_finite.add(name)
            self.note(f"step {step}: {name} is {value}; it is written as null.")
        return None

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=_as_plain) + "\n")

    def _start_trackers(self, values: Mapping[str, Any]) -> None:
        if not self._settings.trackers:
            return
        # accelerate imports torch, so only who asks for a tracker pays for it.
        from accelerate.state import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        from hydra_ppo.compat import start_tracker

        PartialState()
        flat = {name: value if isinstance(value, int | float | str) else str(value) for name, value in _flat(values)}
        for name in self._settings.trackers:
            if name == "tensorboard":
                tracker = TensorBoardTracker(self._settings.project, self.folder / "tensorboard")
            else:
                tracker = WandBTracker(self._settings.project, dir=str(self.folder), name=self.folder.name)
            start_tracker(tracker)
            self._trackers.append(tracker)
            tracker.store_init_configuration(flat)

    def _close(self, state: str, error: BaseException | None) -> None:
        line = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        self._state |= {"state": state, "finished": _now(), "error": line}
        self._write_state()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.finish()

    def _write_state(self) -> None:
        _write_json(self.folder / STATE, self._state)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one move, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=_as_plain)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _as_plain(value: Any) -> Any:
    """Give JSON what numpy and torch scalars, tensors and paths hold."""
    return _finite(value.tolist()) if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    """Return ``value`` with null for what JSON cannot write: NaN and infinity."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shorten(value: object, limit: int = 400) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
