"""Installs the peers: TRL 1.12 into a folder beside this environment, TRL 0.11 into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra_ppo.errors import ConfigError, HydraError

BESIDE = ("trl==1.12.0",)
"""Installed without dependencies: the ones of this environment will do."""

TORCH = "torch==2.13.0"
"""Installed alone before the rest and named again with it, so that nothing resolves to another build."""

ISOLATED = (
    *(TORCH, "trl==0.11.4", "transformers==4.46.3", "peft==0.13.2", "accelerate==1.0.1"),
    *("numpy", "datasets", "rich"),  # TRL imports rich without asking for it
)

STAMP = ".prepared"


class InstallError(HydraError, RuntimeError):
    """A peer could not be installed."""


@dataclass(frozen=True)
class Environment:
    """Where a worker runs: an interpreter, and variables on top of the driver's own."""

    python: str
    variables: dict[str, str] = field(default_factory=dict)


def prepare(folder: Path, names: Collection[str], say: Callable[[str], None]) -> dict[str, Environment]:
    """Install what is missing and return the environments by name.

    Args:
        folder: where they are kept; one that is complete is left as it is.
        names: among `hydra` (this very environment), `trl112` and `trl011`.
        say: takes lines of progress.

    Raises:
        ConfigError: for an unknown name.
        InstallError: when pip fails.
    """
    known = {"hydra": lambda: Environment(sys.executable), "trl112": lambda: _beside(folder, say)}
    known["trl011"] = lambda: _isolated(folder, say)
    found = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"environment={name!r} is not known; choose among {', '.join(known)}.")
        found[name] = known[name]()
    return found


def _beside(folder: Path, say: Callable[[str], None]) -> Environment:
    target = install_beside(folder.resolve() / "trl112", BESIDE, sys.executable, say)
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    return Environment(sys.executable, {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"})


def _isolated(folder: Path, say: Callable[[str], None]) -> Environment:
    # A PYTHONPATH meant for this environment would bring the wrong versions into that one.
    return Environment(build_environment(folder.resolve() / "trl011", ISOLATED, say), {"PYTHONPATH": ""})


def install_beside(target: Path, requirements: Sequence[str], python: str, say: Callable[[str], None]) -> Path:
    """Install packages without dependencies into the folder `target`, to be put on PYTHONPATH; once."""
    if not _ready(target, requirements):
        say(f"installing {' '.join(requirements)} into {target}")
        _clear(target)
        _run([python, *_PIP, "--no-deps", "--target", str(target), *requirements])
        _stamp(target, requirements)
    return target


def build_environment(target: Path, requirements: Sequence[str], say: Callable[[str], None]) -> str:
    """Make a virtual environment in `target`, once, and return its interpreter. `TORCH` goes first and alone."""
    python = target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _ready(target, requirements):
        say(f"building {target}: {' '.join(requirements)}")
        _clear(target)
        _run([sys.executable, "-m", "venv", str(target)])
        say(f"installing {TORCH}")
        _run([str(python), *_PIP, TORCH])
        say("installing the rest")
        _run([str(python), *_PIP, *requirements])
        _stamp(target, requirements)
    return str(python)


_PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def _mark(requirements: Sequence[str]) -> str:
    return "\n".join([sys.version, *requirements])


def _ready(target: Path, requirements: Sequence[str]) -> bool:
    stamp = target / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _mark(requirements)


def _stamp(target: Path, requirements: Sequence[str]) -> None:
    (target / STAMP).write_text(_mark(requirements), encoding="utf-8")


def _clear(target: Path) -> None:
    """Remove what an older or interrupted installation left; keep the folder out of version control."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    (target.parent / ".gitignore").write_text("*\n", encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        raise InstallError(
            f"{' '.join(command[1:])}: exit code {done.returncode}: {lines[-1].strip()}; check that pip reaches its index, "
            "then run again."
        )
