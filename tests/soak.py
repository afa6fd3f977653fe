"""A long run on a tiny model: live tensors, resident memory and file handles stay flat, metrics are complete.

`make soak` runs it: table, and `runs/soak/soak.png`; exit code 1 where something grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from hydra_ppo.cli.main import main as hydra_ppo
from hydra_ppo.training.ppo import PPOTrainer
from tests.faults.project import make_project, ppo_settings, write

SETTLED = 20
"""Steps after which nothing may grow any more."""
FLAT = 0.01


@dataclass(frozen=True)
class Sample:
    """What a process held at the end of a step."""

    step: int
    tensor_bytes: int
    resident_bytes: int
    handles: int


def take(step: int) -> Sample:
    """Measure this process; tensors that only a reference cycle keeps count as live."""
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    return Sample(step, sum(storages.values()), resident, len(list(Path("/proc/self/fd").iterdir())))


def run(folder: Path, steps: int) -> list[Sample]:
    """Run PPO with checkpoints, evaluations, samples and a tracker; return a sample of each step."""
    shutil.rmtree(folder, ignore_errors=True)
    make_project(folder)
    changes: dict[str, Any] = {
        "steps": steps,
        "run": {"save_every": 10, "trackers": ["tensorboard"]},
        "sample_every": 10,
        "eval_every": 10,
        "optimizer": {"learning_rate": 1e-4},
    }
    samples: list[Sample] = []
    whole_step = PPOTrainer._whole_step

    def watched(trainer: PPOTrainer, step: int) -> dict[str, float | None]:
        metrics = whole_step(trainer, step)
        samples.append(take(step))
        if step % 25 == 0:
            print(f"step {step}: {samples[-1].resident_bytes / 2**20:.1f} MiB resident", file=sys.stderr)
        return metrics

    with patch.object(PPOTrainer, "_whole_step", watched):
        code = hydra_ppo(["ppo", write(folder / "soak.yaml", ppo_settings(folder, **changes))])
    if code != 0:
        raise SystemExit(code)
    return samples


def growth(samples: list[Sample], name: str) -> tuple[int, int, float]:
    """Return least and most after the run has settled, and their relative difference."""
    values = [getattr(sample, name) for sample in samples if sample.step > SETTLED]
    return min(values), max(values), (max(values) - min(values)) / min(values)


def missing_metrics(run_folder: Path, steps: int) -> list[str]:
    """Say what `metrics.jsonl` lacks."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]  # 0 is the evaluation before training
    found = [] if [line["step"] for line in lines] == list(range(1, steps + 1)) else ["steps are missing or doubled"]
    names = {name for line in lines for name in line if not name.startswith(("eval/", "memory/"))}
    return found + [f"step {line['step']} lacks {name}" for line in lines for name in sorted(names - line.keys())]


def draw(samples: list[Sample], path: Path) -> None:
    """Draw the three quantities over the steps, relative to their value after the run has settled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    settled = next(sample for sample in samples if sample.step >= min(SETTLED, samples[-1].step))
    lines = (("tensor_bytes", "live tensors", 5), ("resident_bytes", "resident memory", 1.5), ("handles", "file handles", 1.5))
    for name, label, width in lines:
        values = [100 * (getattr(sample, name) / getattr(settled, name) - 1) for sample in samples]
        axes.plot([sample.step for sample in samples], values, label=label, linewidth=width)
    axes.axhspan(-100 * FLAT, 100 * FLAT, alpha=0.12, color="gray", label="within 1%")
    axes.set(xlabel="PPO step", ylabel=f"% above step {settled.step}", ylim=(-3, 3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Run, print the table, draw the picture; return 1 where something grew or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="PPO steps")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="folder to write to")
    options = parser.parse_args(argv)
    if options.steps <= SETTLED:
        parser.error(f"--steps={options.steps} leaves none after the {SETTLED} in which a run settles; take more")
    samples = run(options.output, options.steps)
    table = Table(title=f"{options.steps} PPO steps, after step {SETTLED}", title_justify="left")
    for column in ("quantity", "least", "most", "difference", "flat"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    flat = True
    for name, unit in (("tensor_bytes", 2**20), ("resident_bytes", 2**20), ("handles", 1)):
        least, most, difference = growth(samples, name)
        fine = difference <= FLAT
        flat = flat and fine
        shown = (f"{value / unit:,.2f}" if unit > 1 else str(value) for value in (least, most))
        table.add_row(name.replace("bytes", "MiB"), *shown, f"{difference:.2%}", "yes" if fine else "NO")
    missing = missing_metrics(options.output / "run", options.steps)
    Console().print(table)
    print("metrics: " + (f"complete, {options.steps} lines" if not missing else "; ".join(missing[:5])))
    (options.output / "soak.json").write_text(json.dumps([vars(sample) for sample in samples]) + "\n")
    draw(samples, options.output / "soak.png")
    print(f"picture: {options.output / 'soak.png'}")
    return 0 if flat and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
