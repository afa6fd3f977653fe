"""Checkpoints: whole or not there, and checked before they are used.

::

    checkpoints/step-000020/            20 steps are done
    checkpoints/step-000020.003/        20 steps and 3 optimizer steps of the next
        hydra.json, heads.safetensors, actor/, critic/, ...     what `HydraModel.from_pretrained` reads
        trainer.safetensors, trainer.json                       optimizer, random sources, position, running statistics
        checkpoint.json                                         what the run is, sizes and SHA-256 of all files; itself sealed

Written aside under a name that begins with a dot, flushed to disk, then renamed. Only safetensors and JSON are written, and
nothing else is read: a file that the list does not name makes a checkpoint unusable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_ppo.errors import CheckpointError
from hydra_ppo.runtime.files import sync

FOLDER = "checkpoints"
MANIFEST = "checkpoint.json"
TENSORS, VALUES = "trainer.safetensors", "trainer.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{6,})(?:\.(\d{3,}))?")
_BLOCK = 2**20

Position = tuple[int, int]
"""Steps done, and optimizer steps done of the next one."""


@dataclass
class TrainerState:
    """What a trainer has come to, beside the model: tensors by name, and what JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by what stands before the first dot of their names."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            group, _, rest = name.partition(".")
            found.setdefault(group, {})[rest] = tensor
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        folder: where it lies; `HydraModel.from_pretrained` reads it too.
        position: steps done, and optimizer steps done of the next one.
        run: what the run was that wrote it, as given to `save_checkpoint`.
    """

    folder: Path
    position: Position
    run: dict[str, Any]

    def state(self) -> TrainerState:
        """Read the trainer's state."""
        values = json.loads((self.folder / VALUES).read_text(encoding="utf-8"))
        return TrainerState(load_file(self.folder / TENSORS), values)


def save_checkpoint(
    run_folder: Path,
    position: Position,
    write_model: Callable[[Path], None],
    state: TrainerState,
    run: Mapping[str, Any],
    *,
    score: float | None = None,
    keep_last: int = 2,
    keep_best: int = 0,
) -> Path:
    """Write a checkpoint, then drop what need not be kept. One of the same position that is whole is left as it is.

    Args:
        position: steps done, and optimizer steps done of the next one.
        write_model: writes the model into a folder.
        state: the trainer's.
        run: what the run is; compared on resume. Plain values.
        score: on held-out data, higher is better; None where it was not measured.
        keep_last, keep_best: checkpoints kept, the newest and those with the highest scores.

    Raises:
        CheckpointError: when it could not be written; what was there before is as it was.
    """
    root = run_folder / FOLDER
    final = root / checkpoint_name(position)
    aside = root / f".writing-{final.name}"
    try:
        if not final.exists() or why_unusable(final) is not None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_model(aside)
            _write(aside, position, state, run, score)
            shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one
            os.replace(aside, final)
            sync(root)
        prune(root, position, keep_last, keep_best)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        good = newest_checkpoint(run_folder, lambda text: None)
        left = "there is none before it" if good is None else f"{FOLDER}/{good.folder.name} is intact"
        raise CheckpointError(
            f"{FOLDER}/{final.name} could not be written ({reason}); {left}. Make room on the disk, then go on with --resume."
        ) from error
    return final


def _write(folder: Path, position: Position, state: TrainerState, run: Mapping[str, Any], score: float | None) -> None:
    """Write state and manifest beside the model, everything flushed to disk."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, folder / TENSORS)
    (folder / VALUES).write_text(json.dumps(state.values), encoding="utf-8")
    files = {}
    for path in _files(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    content = {"format": FORMAT, "position": list(position), "score": score, "run": run, "files": files}
    sealed = {"sha256": _seal(content), "content": content}
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync(path)


def newest_checkpoint(run_folder: Path, note: Callable[[str], None], before: Position | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, None where there is none.

    Args:
        run_folder: of the run.
        note: gets a line on each that is passed over.
        before: only those of earlier positions.
    """
    for position, folder in sorted(_named(run_folder / FOLDER), reverse=True):
        if before is not None and position >= before:
            continue
        problem = why_unusable(folder)
        if problem is None:
            return Checkpoint(folder, position, _content(folder)["run"])
        note(f"{FOLDER}/{folder.name} is damaged: {problem}")
    return None


def why_unusable(folder: Path) -> str | None:
    """Check names, sizes and checksums of all files; return what is wrong, None where nothing is."""
    try:
        content = _content(folder)
        if (problem := _why_unsound(content, folder.name)) is not None:
            return problem
        listed = content["files"]
        there = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
        if content["format"] != FORMAT:
            return f"format={content['format']!r} is not the {FORMAT} that this version reads"
        if missing := sorted(listed.keys() - there):
            return f"{missing[0]} is missing"
        if strange := sorted(there - listed.keys()):
            return f"{strange[0]} does not belong to it"
        if wrong := sorted(name for name in listed if not name.endswith((".json", ".safetensors"))):
            return f"{wrong[0]} is neither safetensors nor JSON"
        for name, entry in listed.items():
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(folder / name).stat().st_size:,} bytes, not {entry['bytes']:,}"
            if _digest(folder / name) != entry["sha256"]:
                return f"{name} was altered (its checksum differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return str(error) if isinstance(error, _Broken) else f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _why_unsound(content: Any, name: str) -> str | None:
    """Say what of a manifest is not as this program writes it, whatever its seal; None where all is."""
    run = content.get("run")
    if not isinstance(run, dict) or not all(isinstance(run.get(part), dict) for part in ("config", "digests")):
        return f"{MANIFEST} does not say what the run is"
    if not isinstance(run.get("optimizer_steps"), int) or not isinstance(run.get("begun"), str):
        return f"{MANIFEST} does not say how long the run is and when it began"
    try:
        datetime.fromisoformat(run["begun"])
    except ValueError:
        return f"{MANIFEST} says begun={run['begun']!r}"
    position, score = content.get("position"), content.get("score")
    if not isinstance(position, list) or [type(part) for part in position] != [int, int]:
        return f"{MANIFEST} says position={position!r}"
    if checkpoint_name((position[0], position[1])) != name:
        return f"it was written as {checkpoint_name((position[0], position[1]))}"
    if not isinstance(score, int | float | None):
        return f"{MANIFEST} says score={score!r}"
    return None


def why_unlike(found: Any, like: Any, where: str = VALUES) -> str | None:
    """Say where saved values are of another form than those of a trainer that has not begun; None where they are not.

    Args:
        found: what was saved: plain values.
        like: what a fresh trainer would save. Where it holds nothing yet (None, or no entries), anything will do.
        where: name of the values, for the answer.
    """
    if like is None or found is None:
        return None
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping):
            return f"{where} is {type(found).__name__}"
        missing = sorted(str(name) for name in like.keys() - found.keys())
        if missing:
            return f"{where} lacks {missing[0]}"
        return next((problem for name in like if (problem := why_unlike(found[name], like[name], f"{where}.{name}"))), None)
    if isinstance(like, list | tuple):
        return None if isinstance(found, list | tuple) else f"{where} is {type(found).__name__}"
    numbers = isinstance(like, int | float) and isinstance(found, int | float)
    return None if numbers or type(found) is type(like) else f"{where} is {type(found).__name__}, not {type(like).__name__}"


class _Broken(ValueError):
    """A manifest that is not as it was written."""


def _content(folder: Path) -> dict[str, Any]:
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Broken(f"{MANIFEST} is missing") from None
    if _seal(sealed["content"]) != sealed["sha256"]:
        raise _Broken(f"{MANIFEST} was altered (its checksum differs)")
    return sealed["content"]


def prune(root: Path, position: Position, keep_last: int, keep_best: int) -> None:
    """Drop checkpoints up to `position` that are neither among the newest nor among the best, and what was half written."""
    named = sorted(item for item in _named(root) if item[0] <= position)
    scores = {folder: _score(folder) for _, folder in named} if keep_best else {}
    best = sorted((folder for folder in scores if scores[folder] is not None), key=lambda f: (scores[f], f.name))
    kept = {folder for _, folder in named[-keep_last:]} | set(best[-keep_best:] if keep_best else [])
    for _, folder in named:
        if folder not in kept:
            # A folder that is half removed must not look like a checkpoint.
            doomed = root / f".dropping-{folder.name}"
            os.replace(folder, doomed)
    drop_leftovers(root)


def drop_leftovers(root: Path) -> None:
    """Remove what was half written or half removed when a process died. Only for who holds the run folder."""
    for pattern in (".dropping-*", ".writing-*"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _score(folder: Path) -> float | None:
    try:
        return _content(folder)["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoint_name(position: Position) -> str:
    """Return the folder name of a checkpoint."""
    step, part = position
    return f"step-{step:06d}" + (f".{part:03d}" if part else "")


def _named(root: Path) -> Iterator[tuple[Position, Path]]:
    for path in root.glob("step-*"):
        if match := _NAME.fullmatch(path.name):
            yield (int(match[1]), int(match[2] or 0)), path


def _files(folder: Path) -> list[Path]:
    """Every file below; a link counts as one and is never followed."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
