"""Runs the trainers of all hosts with and without the patch: `python -m tests.hosts.run [HOST ...]`, or `make test-hosts`.

Each host has an environment of its own, built on first use, and a check that runs the host's unmodified trainer on tiny
random models. What is judged is in `problems`; the exit code is 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.errors import HydraError
from hydra_ppo.profiling.benchmarks.peers.environments import Environment
from tests.hosts.environments import HOSTS, ROOT, Host, prepare

LIMIT = 1e-4
"""Largest difference between a role's numbers on views and on separate models of equal weights, as the host computes them."""

TIMEOUT = 600  # seconds a check may take
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the hosts named, all by default; print a table and return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.hosts.run", description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=f"among {', '.join(HOSTS)}; all by default")
    parser.add_argument("--environments", type=Path, default=Path(".hosts"), help="where hosts are installed")
    parser.add_argument("--output", type=Path, default=Path("runs/hosts/hosts.json"), help="results, as JSON")
    options = parser.parse_args(argv)
    if unknown := set(options.hosts) - set(HOSTS):
        parser.error(f"unknown host {sorted(unknown)[0]}; choose among {', '.join(HOSTS)}")
    console = Console(stderr=True)
    rows = []
    for name in options.hosts or HOSTS:
        console.print(f"{name}:", highlight=False)
        rows.append(check(HOSTS[name], options.environments, console))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 150).print(table(rows))
    for row in rows:
        for problem in row["problems"]:
            print(f"{row['host']}: {problem}")
    return 1 if any(row["problems"] for row in rows) else 0


def check(host: Host, environments: Path, console: Console) -> dict[str, Any]:
    """Run one host in both modes and judge it."""
    row: dict[str, Any] = {"host": host.name, "problems": []}
    try:
        place = prepare(host, environments, lambda line: console.print(f"  {line}", highlight=False))
    except HydraError as error:
        return row | {"problems": [str(error)]}
    with tempfile.TemporaryDirectory() as scratch:
        for mode in ("unpatched", "patched"):
            arguments = ["--mode", mode, "--folder", str(Path(scratch) / mode)]
            found = execute(place, host.check, arguments, Path(scratch) / f"{mode}.json", console)
            if isinstance(found, str):
                row["problems"].append(f"{mode}: {found}")
                continue
            row[mode] = found
            console.print(f"  {mode}: {found['seconds']:.1f} s", highlight=False)
        if host.example:
            found = command(place, [part.format(folder=Path(scratch) / "example") for part in host.example], console)
            row["problems"] += [f"{' '.join(host.example)}: {found}"] if found else []
            console.print(f"  example: {'failed' if found else 'runs'}", highlight=False)
        if host.extra:
            found = execute(place, host.extra, [], Path(scratch) / "extra.json", console)
            row["extra"] = {"problems": [found], "notes": []} if isinstance(found, str) else found
            row["problems"] += [f"{host.extra}: {problem}" for problem in row["extra"]["problems"]]
            for note in row["extra"]["notes"]:
                console.print(f"  {note}", highlight=False)
    row["problems"] += judge(row)
    return row


def execute(place: Environment, script: str, arguments: list[str], output: Path, console: Console) -> dict[str, Any] | str:
    """Run a script of this folder in a host's environment and return what it wrote to `output`, or what went wrong."""
    path = Path(__file__).parent / script
    problem = command(place, [place.python, str(path), *arguments, "--output", str(output)], console)
    if problem is None and not output.exists():
        problem = "it ended without a result"
    return problem or json.loads(output.read_text(encoding="utf-8"))


def command(place: Environment, arguments: list[str], console: Console) -> str | None:
    """Run a command in a host's environment, from the root; return what went wrong, or None."""
    path = f"{Path(place.python).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, **place.variables, "PATH": path}
    try:
        done = subprocess.run(
            arguments,
            env=variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT} s"
    if not done.returncode:
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    console.print("\n".join(lines[-25:]), markup=False, highlight=False)
    return f"exit code {done.returncode}: {lines[-1].strip()}"


def judge(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with the results of one host, as sentences."""
    found = []
    for mode in ("unpatched", "patched"):
        losses = row.get(mode, {}).get("losses", [])
        if mode not in row:
            continue
        found += [f"{mode}: {problem}" for problem in row[mode]["problems"]]
        if len(losses) < 3 or not all(math.isfinite(loss) for loss in losses):
            found.append(f"{mode}: losses {losses} are not three or more finite numbers")
    if "patched" not in row or "unpatched" not in row:
        return found
    patched, unpatched = row["patched"], row["unpatched"]
    third = max(1, len(patched["losses"]) // 3)
    if not fmean(patched["losses"][-third:]) < fmean(patched["losses"][:third]):
        found.append(f"patched: losses {patched['losses']} do not fall")
    if not patched["differences"]:
        found.append("patched: nothing was compared with separate models")
    found += [f"{name} differ by {gap:.2g}" for name, gap in patched["differences"].items() if not gap <= LIMIT]
    if sorted(patched["changed"]) != ["actor", "critic"]:
        found.append(f"training changed {patched['changed']}, not actor and critic")
    if not patched["base_identical"]:
        found.append("training changed the base")
    if not patched["undone"]:
        found.append("the patch did not undo itself")
    if not patched["peak_bytes"] < unpatched["peak_bytes"]:
        found.append(f"peak of {patched['peak_bytes']} bytes is not below {unpatched['peak_bytes']} unpatched")
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a line per host."""
    result = Table(title="Hosts, unpatched and patched: tiny random models, fp32, one thread")
    headings = ("host", "transformers", "peft", "largest difference", "loss, first and last", "peak MiB", "ratio", "verdict")
    for heading in headings:
        result.add_column(heading)
    for row in rows:
        patched, unpatched = row.get("patched"), row.get("unpatched")
        cells = ["-"] * 6
        if patched and unpatched:
            cells = [
                patched["versions"]["transformers"],
                patched["versions"]["peft"],
                f"{max(patched['differences'].values(), default=math.nan):.1e}",
                f"{patched['losses'][0]:.3g}, {patched['losses'][-1]:.3g}" if patched["losses"] else "-",
                f"{unpatched['peak_bytes'] / MIB:.1f} -> {patched['peak_bytes'] / MIB:.1f}",
                f"{patched['peak_bytes'] / unpatched['peak_bytes']:.2f}",
            ]
        result.add_row(row["host"], *cells, "failed" if row["problems"] else "passed")
    return result


if __name__ == "__main__":
    sys.exit(main())
