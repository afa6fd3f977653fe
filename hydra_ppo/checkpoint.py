"""Checkpoints of a run: written aside, then renamed, so that a folder of that name is always whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hydra_ppo.model import HydraModel

FOLDER = "checkpoints"


def save_checkpoint(run_folder: Path, step: int, model: HydraModel, keep_last: int) -> Path:
    """Write `checkpoints/step-<n>`, which `HydraModel.from_pretrained` reads, and drop the oldest beyond `keep_last`."""
    root = run_folder / FOLDER
    final = root / f"step-{step:06d}"
    aside = root / f".writing-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    for path in aside.rglob("*"):
        if path.is_file():
            _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    _sync(root)
    for old in sorted(root.glob("step-*"))[:-keep_last]:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
