"""Builds sdist and wheel, installs each into a new environment, and uses it from an empty folder: `make dist`.

What is built stays in dist/; the environments go. A line for each thing that was done.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
COMMANDS = (
    ["--version"],
    ["--help"],
    ["doctor"],
    ["ppo", "--print-config"],
    ["plan", "--model", "llama-3.2-1b", "--gpu-memory", "8GiB", "--prompt", "128", "--response", "128"],
)
"""`hydra-ppo` with each must end with 0, away from the checkout."""


def main() -> None:
    """Build, look inside, install, use."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tools = environment(place / "tools")
        run([tools, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "build"])
        for old in DIST.glob("hydra_ppo-*"):
            old.unlink()
        run([tools, "-m", "build", "-q", "--outdir", DIST, ROOT])
        built = sorted(DIST.glob("hydra_ppo-*"))
        if [path.suffix for path in built] != [".whl", ".gz"]:
            raise SystemExit(f"dist holds {[path.name for path in built]}, not a wheel and an sdist.")
        for path in built:
            check_contents(path)
            use(path, place / path.suffix[1:])


def check_contents(path: Path) -> None:
    """Refuse an archive that lacks a module of the checkout, or holds tests, runs or anything else of it.

    Raises:
        SystemExit: naming them.
    """
    packages = {
        "hydra_ppo": ROOT / "hydra_ppo",
        "hydra_ppo/patches": ROOT / "patches",
        "hydra_ppo/profiling": ROOT / "profiling",
    }
    wanted = {
        f"{name}/{file.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for file in [*folder.rglob("*.py"), *folder.rglob("py.typed")]
    }
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
    else:
        with tarfile.open(path) as archive:
            names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        names = {f"hydra_ppo/{name}" if name.startswith(("patches/", "profiling/")) else name for name in names}
        names = {name for name in names if name.startswith("hydra_ppo/")}
    if lost := sorted(wanted - names):
        raise SystemExit(f"{path.name} lacks {len(lost)} files, such as {lost[0]}; name its package in setup.cfg.")
    if foreign := sorted(names - wanted):
        raise SystemExit(f"{path.name} holds {foreign[0]}, which is no part of the package.")
    print(f"{path.name}: {len(wanted)} files of the package, {path.stat().st_size / 2**10:.0f} KiB", flush=True)


def use(path: Path, place: Path) -> None:
    """Install an archive into a new environment and call its commands from an empty folder."""
    python = environment(place)
    begun = time.monotonic()
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run([*pip, "torch"])
    run([*pip, path])
    print(f"{path.name}: installed in {time.monotonic() - begun:.0f} s", flush=True)
    empty = place / "empty"
    empty.mkdir()
    for arguments in COMMANDS:
        begun = time.monotonic()
        text = run([python.parent / "hydra-ppo", *arguments], cwd=empty)
        lines = [line for line in text.splitlines() if line.strip()]
        print(f"  hydra-ppo {' '.join(arguments)}: {len(lines)} lines, {time.monotonic() - begun:.0f} s", flush=True)
    if left := sorted(found.name for found in empty.iterdir()):
        raise SystemExit(f"{path.name}: its commands left {left[0]!r} behind.")


def environment(place: Path) -> Path:
    """Make a virtual environment and return its python."""
    venv.create(place, with_pip=True)
    return place / "bin" / "python"


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    """Run a command and return what it printed.

    Raises:
        SystemExit: where it fails, with what it printed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
