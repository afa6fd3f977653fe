"""Paths among the settings: `~` is a home wherever it is written, and a run's own config names them from where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra_ppo.config.reading import read_yaml
from hydra_ppo.errors import ConfigError

PATHS = ("model.name_or_path", "model.adapter", "data.train", "data.eval", "run.output", "ptx.data", "rehearsal.data")
SOURCES = ("reward.sources", "eval_rewards")
"""Settings that may be paths, and the lists of those whose `target` is one where their kind is classifier or head."""

MARK, THIS_FILE = "paths_are_relative_to", "this file"
"""Key and value that a run's own config begins with."""


def for_folder(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return nested settings for the config of a run folder: what lies on this machine is named from there.

    So a run can be moved together with what it reads. Names on the hub stay as they are.

    Args:
        values: all settings, nested.
        folder: the run folder.
    """
    here = folder.resolve()

    def name(setting: str, value: str) -> str:
        path = Path(value).expanduser()
        if setting != "run.output" and not _exists(path):
            return value
        # A link keeps its own name: in the hub's cache what it leads to has no ending that says what it is.
        found = os.path.relpath(path.parent.resolve() / path.name, here)
        return found if found.startswith("..") else os.path.join(".", found)

    changed = _with_paths(values, name)
    changed.setdefault("run", {})["output"] = "."
    return {MARK: THIS_FILE} | changed


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings; of a run's own, paths are turned into such as are found from the working directory.

    Raises:
        ConfigError: see `read_yaml`.
    """
    content = read_yaml(path)
    if MARK not in content:
        return content
    if (mark := content.pop(MARK)) != THIS_FILE:
        raise ConfigError(f"{path}: {MARK}={mark!r} is not {THIS_FILE!r}; leave it out.")
    folder = Path(path).expanduser().parent

    def name(setting: str, value: str) -> str:
        if value != "." and not value.startswith(("./", "../")):
            return value
        found = Path(os.path.normpath(folder.resolve() / value))
        return os.path.relpath(found) if found.is_relative_to(Path.cwd()) else str(found)

    return _with_paths(content, name)


def is_run_config(path: Path) -> bool:
    """Say whether a file of settings is a run's own: it lies beside the run's state."""
    return path.name == "config.yaml" and (path.parent / "state.json").is_file()


def _with_paths(values: Mapping[str, Any], name: Callable[[str, str], str]) -> dict[str, Any]:
    """Return nested settings with paths named anew."""
    changed = deepcopy(dict(values))
    for setting in PATHS:
        group, leaf = setting.split(".")
        inner = changed.get(group)
        if isinstance(inner, dict) and isinstance(inner.get(leaf), str):
            inner[leaf] = name(setting, inner[leaf])
    for setting in SOURCES:
        group, _, leaf = setting.partition(".")
        inner = changed.get(group)
        listed = inner.get(leaf) if leaf and isinstance(inner, dict) else inner
        for source in listed if isinstance(listed, list) else []:
            is_folder = isinstance(source, dict) and source.get("kind", "head") in ("classifier", "head")
            if is_folder and isinstance(source.get("target"), str):
                source["target"] = name(setting, source["target"])
    return changed


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # what no file can be called
        return False
