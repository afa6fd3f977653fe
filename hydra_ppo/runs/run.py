"""The run folder: settings, metrics, samples, state and log of one training run.

::

    config.yaml     every setting; loads back as a config; paths are relative to the folder
    metrics.jsonl   one object per logged step: step, time (seconds since the epoch), metrics (null: not measured)
    samples.jsonl   one object per recorded sample: step and what the trainer gives
    alarms.jsonl    one object per alarm: step, name, line, numbers; there where one was raised
    state.json      command, state (starting, running, finished, failed, interrupted), pid, times, versions, error
    .lock           held by the process that writes the folder
    log.txt         what was printed
    report.html     the run's page, where it came to its end
    summary.json    written last, by ``finish``
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo import __version__
from hydra_ppo.config.paths import MARK, for_folder
from hydra_ppo.config.reading import as_values
from hydra_ppo.config.settings import PPOConfig, RunSettings, SFTConfig
from hydra_ppo.config.writing import render_yaml
from hydra_ppo.errors import ConfigError, StorageError
from hydra_ppo.runs.contents import ALARMS, CONFIG, LOG, METRICS, REPORT, SAMPLES, STATE, SUMMARY, clear, set_aside
from hydra_ppo.runs.folder import STARTING, check_output, is_starting, lock, read_state
from hydra_ppo.runs.progress import shown_progress
from hydra_ppo.runs.tracker_names import for_trackers
from hydra_ppo.runtime.files import sync, write_whole
from hydra_ppo.runtime.interruption import StopRequested

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "numpy")
SAMPLE_ROWS_SHOWN = 4


class Run:
    """An open run folder. Use as a context manager: an exception inside marks the run failed or interrupted."""

    folder: Path

    def __init__(self, folder: Path, settings: RunSettings, state: dict[str, Any], console: Console) -> None:
        """Use ``Run.create``."""
        self.folder = folder
        self._settings = settings
        self._state = state
        self._console = console
        self._lock: FileLock | None = None
        self._trackers: list[Any] = []
        self._not_finite: set[str] = set()

    @classmethod
    def create(
        cls,
        settings: RunSettings,
        config: SFTConfig | PPOConfig | dict[str, Any],
        command: str,
        *,
        resume: bool = False,
        done: int = 0,
        sampled: int = 0,
    ) -> Run:
        """Make the folder and write its config and state; nothing is made or removed where a check fails.

        Args:
            settings: The run's own settings.
            config: Written to ``config.yaml``.
            command: Name of what runs, such as ``ppo``.
            resume: Go on with the run that the folder holds: its metrics and samples stay as far as they count.
            done: Steps done; metrics of later ones are dropped, they will be written again.
            sampled: Steps whose samples stay.

        Raises:
            ConfigError: See ``check_output``; also where the folder cannot be made, or another process writes it.
        """
        folder = check_output(settings, config, command=command, resume=resume)
        values = config if isinstance(config, dict) else as_values(config)
        name = f"run.output={settings.output!r}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder, name)
        except OSError as error:
            raise ConfigError(f"{name} cannot be written ({error.strerror}); choose another folder.") from None
        begins = done + sampled == 0
        before = (read_state(folder) or {}) if resume and not begins else {}
        state = {
            "command": command,
            "state": STARTING if begins else "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": before.get("started") or _now(),
            "resumed": [*_list(before.get("resumed")), {"time": _now(), "step": done}] if before else [],
            "finished": None,
            "error": None,
            "version": __version__,
            "python": sys.version.split()[0],
            "packages": {name: version(name) for name in PACKAGES},
            "tracking_id": before.get("tracking_id") or uuid.uuid4().hex,
        }
        run = cls(folder, settings, state, Console(stderr=True))
        run._lock = held
        # Killed after any of these lines, the folder is one that goes on, or that begins anew without being asked twice.
        try:
            aside = set_aside(folder) if begins and resume and not is_starting(folder) else None
            run._write_state()
            if begins:
                clear(folder)
            else:
                for name in (SUMMARY, REPORT):
                    (folder / name).unlink(missing_ok=True)
                keep_steps(folder / METRICS, done)
                keep_steps(folder / ALARMS, done)
                keep_steps(folder / SAMPLES, max(done, sampled), held_out=done)
            with run.storing(CONFIG):
                write_whole(folder / CONFIG, _as_text(config, folder))
            run._start_trackers(values, done)
            if begins:
                run._state["state"] = "running"
                run._write_state()
        except BaseException as error:
            run._close("failed", error)
            raise
        if aside is not None:
            run.note(f"what was there before, without coming to a checkpoint, is in {aside}")
        return run

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line to ``metrics.jsonl`` and pass the values on to the trackers.

        A value that was not measured is null. So is NaN or infinity, which JSON lacks; the first of each metric
        is noted in the log.
        """
        values = {name: self._number(step, name, value) for name, value in metrics.items()}
        self._append(METRICS, {"step": step, "time": round(time.time(), 3), **values})
        measured = {name: value for name, value in values.items() if value is not None}
        shown = for_trackers(measured, self._settings.tracker_names)
        for tracker in self._trackers:
            tracker.log(shown, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Append ``rows`` (prompt, response, score, ...) to ``samples.jsonl`` and show the first few as a table."""
        for row in rows:
            self._append(SAMPLES, {"step": step, **row})
        if not self._settings.progress or not rows:
            return
        kind = "Samples of held-out prompts" if rows[0].get("held_out") else "Samples"
        table = Table(title=f"{kind} at step {step}", show_lines=True)
        for name in ("prompt", "response"):
            table.add_column(name, overflow="fold", ratio=1)
        table.add_column("score", justify="right")
        for row in rows[:SAMPLE_ROWS_SHOWN]:
            score = row.get("score")
            shown = f"{score:.3f}" if isinstance(score, float) else "-" if score is None else str(score)
            table.add_row(Text(_shorten(row.get("prompt"))), Text(_shorten(row.get("response"))), shown)
        self._console.print(table)

    def alarm(self, step: int, name: str, line: str, values: Mapping[str, float | None]) -> None:
        """Append one line to ``alarms.jsonl`` and note it."""
        self._append(ALARMS, {"step": step, "name": name, "line": line, **values})
        self.note(f"alarm at step {step}, {name}: {line}")

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Callable[[int, str], None]]:
        """Show how far ``total`` steps are; yields ``advance(steps, text)``."""
        if not self._settings.progress:
            yield lambda steps, text: None
            return
        with shown_progress(self._console, total, description) as advance:
            yield advance

    def note(self, text: str) -> None:
        """Write one line to the console and, with the time, to ``log.txt``."""
        line = " ".join(text.split())
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._write(LOG, f"{_now()} {line}\n")

    def on_device(self, name: str, size: int) -> None:
        """Keep the name of the card that the run is on, and its bytes, in ``state.json``."""
        self._state["device"] = {"name": name, "bytes": size}
        self._write_state()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` and mark the run finished."""
        with self.storing(SUMMARY):
            _write_json(self.folder / SUMMARY, summary)
        self._close("finished", None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt | StopRequested):
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
        self._write(name, json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=_as_plain) + "\n")

    def _write(self, name: str, text: str) -> None:
        # Half a surrogate pair, which UTF-8 lacks, becomes its escape, which JSON has.
        with self.storing(name), (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    @contextmanager
    def storing(self, name: str) -> Iterator[None]:
        """Say, where something cannot be written inside the block, what it was and what is safe.

        Args:
            name: what is written, below the run folder.

        Raises:
            StorageError: instead of OSError, and of what safetensors raises.
        """
        from safetensors import SafetensorError

        try:
            yield
        except StorageError:
            raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise StorageError(
                f"{self.folder / name} cannot be written ({reason}); {self._safe()}: make room or make the folder writable, "
                "then go on with --resume."
            ) from error

    def _safe(self) -> str:
        from hydra_ppo.runs.checkpoint import FOLDER, newest_checkpoint  # which imports torch

        found = newest_checkpoint(self.folder, lambda text: None)
        return "no checkpoint was written yet" if found is None else f"{FOLDER}/{found.folder.name} is intact"

    def flush(self) -> None:
        """See that what was written so far is on the disk."""
        for name in (METRICS, SAMPLES, ALARMS):
            if (self.folder / name).exists():
                sync(self.folder / name)

    def _start_trackers(self, values: Mapping[str, Any], done: int) -> None:
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
                # What a dead process logged beyond its last checkpoint is logged again.
                purge = {"purge_step": done + 1} if done else {}
                tracker = TensorBoardTracker(self._settings.project, self.folder / "tensorboard", **purge)
            else:
                same = {"id": self._state["tracking_id"], "resume": "allow"}
                tracker = WandBTracker(self._settings.project, dir=str(self.folder), name=self.folder.name, **same)
            start_tracker(tracker)
            self._trackers.append(tracker)
            tracker.store_init_configuration(flat)

    def _close(self, state: str, error: BaseException | None) -> None:
        line = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
        # What was cut off while it began stays so: its folder may be half cleared.
        state = STARTING if self._state["state"] == STARTING else state
        self._state |= {"state": state, "finished": _now(), "error": line}
        try:
            self._write_state()
        except OSError:  # a full disk: why the run ended matters more, and a lock that nobody holds says that it did
            if error is None:
                raise
        finally:
            trackers, self._trackers = self._trackers, []
            for tracker in trackers:
                tracker.finish()
            if self._lock is not None:
                self._lock.release()

    def _write_state(self) -> None:
        with self.storing(STATE):
            _write_json(self.folder / STATE, self._state)


def _as_text(config: SFTConfig | PPOConfig | dict[str, Any], folder: Path) -> str:
    """Return the settings as YAML that loads back, wherever the folder lies then."""
    if isinstance(config, dict):
        return yaml.safe_dump(config, sort_keys=False)
    values = for_folder(as_values(config), folder)
    values["run"]["overwrite"] = False  # how the run began; whoever loads this file goes on with it
    mark = values.pop(MARK)
    return f"{MARK}: {mark}\n" + render_yaml(type(config), values, comments=False)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def keep_steps(path: Path, last: int, held_out: int | None = None) -> None:
    """Drop records of later steps than `last`, and a line that was half written, from a file of JSON lines.

    Args:
        held_out: the last step of samples that come from an evaluation, where it is another.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("step", 0) if isinstance(record, dict) else None
        bound = last if held_out is None or not step or not record.get("held_out") else held_out
        if line.endswith(b"\n") and isinstance(step, int) and step <= bound:
            kept.append(line)
    write_whole(path, b"".join(kept))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one move, so that a reader never sees half of it."""
    write_whole(path, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=_as_plain) + "\n")


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


def version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
