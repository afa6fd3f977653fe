"""The run folder before a run opens it: what it holds, whether it may be written, who is writing it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hydra_ppo.config.settings import PPOConfig, RunSettings, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.runs.contents import CHECKPOINTS, LOCK, STATE
from hydra_ppo.runtime.files import PARTIAL

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
STARTING = "starting"
"""State of a run that has not begun: what was in its folder may be half removed, and its settings not be written yet."""


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return ``state.json`` of a run folder, or None where there is none or it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def check_output(
    settings: RunSettings,
    config: SFTConfig | PPOConfig | Mapping[str, Any] | None = None,
    *,
    command: str = "",
    resume: bool = False,
) -> Path:
    """Check that a run may be written to ``settings.output``, and change nothing.

    Args:
        settings: The run's own settings.
        config: All settings of sft or ppo, so that what the run reads is not overwritten.
        command: Name of what runs; a run of another command cannot be gone on with.
        resume: Whether the run that the folder holds is to go on; one that holds none begins.

    Raises:
        ConfigError: The folder holds a run (and neither ``overwrite`` nor ``resume`` is on), other files, a run in
            progress, or the model or data that this run reads; or a tracker's package is missing.
    """
    if resume and settings.overwrite:
        raise ConfigError("--resume with run.overwrite=true asks for two things; leave one out.")
    name = f"run.output={settings.output!r}"
    try:
        folder = Path(settings.output).expanduser()
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, `~` of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name} cannot be made ({reason}); choose another folder.") from None
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
    begun = (folder / STATE).exists()
    if not begun and {path.name for path in folder.iterdir()} - {LOCK, STATE + PARTIAL}:
        raise ConfigError(f"{name} is not empty and holds no run; choose another folder.")
    if is_locked(folder):
        raise ConfigError(f"{name} is being written by {_writer(state)}; wait for it, stop it, or choose another folder.")
    if not begun:
        return folder  # of a process that died before it wrote anything
    verdict = (state or {}).get("state")
    holds = "a finished run" if verdict == "finished" else f"an unfinished run ({verdict or 'unreadable state'})"
    if resume and verdict != STARTING:
        other = (state or {}).get("command")
        if other is not None and other != command:
            raise ConfigError(f"{name} holds a run of {other}, not of {command}; choose its own command or another folder.")
        if any((folder / CHECKPOINTS).glob("step-*")):
            return folder  # nothing is cleared
        if state is None or verdict == "finished":
            raise ConfigError(
                f"{name} holds {holds} without a checkpoint to go on from, and is left as it is; choose another folder."
            )
    elif not settings.overwrite and verdict != STARTING:
        remedy = "choose another folder, go on with --resume, or pass --run.overwrite true."
        raise ConfigError(f"{name} holds {holds}; {remedy}")
    for setting, source in _sources(config):
        if _lies_in(Path(source).expanduser(), folder):
            how = "run.overwrite=true" if settings.overwrite else "--resume, without a checkpoint to go on from,"
            raise ConfigError(f"{name} with {how} would delete {setting}={source!r}; choose another folder.")
    return folder


def _lies_in(path: Path, folder: Path) -> bool:
    """Say whether a path is a folder, or below it: by its name, as the link that would go, or as what it leads to."""
    try:
        if not path.exists():
            return False
        names = {Path(os.path.abspath(path)), path.resolve()}
        folders = {Path(os.path.abspath(folder)), folder.resolve()}
    except (OSError, ValueError, RuntimeError):  # what no file can be called
        return False
    return any(one == other or other in one.parents for one in names for other in folders)


def has_died(folder: Path, state: Mapping[str, Any]) -> bool:
    """Say whether a run that calls itself running has lost its process; not known, so no, of one on another machine."""
    return state.get("state") in ("running", STARTING) and state.get("host") == socket.gethostname() and not is_locked(folder)


def is_starting(folder: Path) -> bool:
    """Say whether the run of a folder was cut off before it had begun: nothing in it is to go on from."""
    return (read_state(folder) or {}).get("state") == STARTING


def is_locked(folder: Path) -> bool:
    """Say whether a process holds the run folder; one that has died does not."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a read-only folder, which nobody writes
        return False


def lock(folder: Path, name: str) -> FileLock:
    """Hold the run folder until the process ends or the lock is released.

    Raises:
        ConfigError: Another process holds it; names that process.
    """
    held = FileLock(folder / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise ConfigError(
            f"{name} is being written by {_writer(read_state(folder))}; wait for it, stop it, or choose another folder."
        ) from None
    return held


def _writer(state: Mapping[str, Any] | None) -> str:
    pid, host = (state or {}).get("pid"), (state or {}).get("host")
    return "another process" if pid is None else f"process {pid}" + ("" if host == socket.gethostname() else f" on {host}")


def _sources(config: SFTConfig | PPOConfig | Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if isinstance(config, SFTConfig | PPOConfig):
        yield "model.name_or_path", config.model.name_or_path
        if base := _base_beside(Path(config.model.name_or_path)):
            yield "the base of model.name_or_path", base
        if config.model.adapter is not None:
            yield "model.adapter", config.model.adapter
        yield "data.train", config.data.train
        if config.data.eval:
            yield "data.eval", config.data.eval
    if isinstance(config, PPOConfig):
        for setting, source in config.named_sources():
            name = f"{setting}.target"
            if source.kind == "classifier" and source.target:
                yield name, source.target
                if base := _base_beside(Path(source.target)):
                    yield f"the base of {name}", base


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
