"""What one of several GPUs holds and sends, by model and number of GPUs: the table of docs/scale.md.

    python -m hydra_ppo.profiling.cli.scale [--models llama-3.1-8b,...] [--quantization nf4]

Bytes held are simulated; bytes sent are counted: a ring sends (W - 1) / W of what it gathers and twice that of what it sums
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 4).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.profiling.cli.predictor import Predictor
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.runtime.tables import print_table

GPUS = {
    "llama-3.1-8b": ((1, False), (2, False), (4, False), (4, True), (8, True)),
    "llama-3.1-70b": ((1, False), (4, False), (4, True), (8, True), (16, True)),
    "llama-3.1-405b": ((8, True), (16, True), (32, True), (64, True)),
}
"""(processes, whether the base is shared out) of each model's rows."""

PER_GPU = 8
"""Responses of a step for each GPU."""


@dataclass(frozen=True)
class Row:
    """One layout.

    Attributes:
        model, gpus, shard: which.
        peak, tightest: bytes of rank 0 at most, and the phase of that.
        base: bytes of the base that it keeps.
        gradients: bytes that a process sends for the gradients of one optimizer step.
        updates: bytes that it receives in the updates of one PPO step where the base is shared out: each micro-batch of each
            role goes forward, and once more where it is recomputed.
        token: bytes that it receives for each token that is decoded by all, which is why rollouts of a shared out base belong
            on vLLM.
    """

    model: str
    gpus: int
    shard: bool
    peak: int
    tightest: str
    base: int
    gradients: int
    updates: int
    token: int


def rows(predictor: Predictor, workload: Workload, layouts: tuple[tuple[int, bool], ...]) -> Iterator[Row]:
    """Yield the rows of one model.

    Args:
        predictor: of the model.
        workload: of one GPU.
        layouts: processes, and whether the base is shared out.
    """
    for gpus, shard in layouts:
        sized = replace(workload, world=gpus, shard_base=shard, rollout_batch=PER_GPU * gpus)
        phases = {phase: size for phase, size in predictor.with_loading(sized).items() if phase != "load"}
        tightest = max(phases, key=lambda phase: phases[phase])
        linear = predictor.least(replace(sized, shard_base=False))
        rest = (predictor.parameters - predictor.linear) * predictor.itemsize
        away = (gpus - 1) / gpus
        passes = 2 * 2 * PER_GPU // sized.microbatch  # two roles, forward and recomputed, for each micro-batch of this process
        yield Row(
            model=workload.model,
            gpus=gpus,
            shard=shard,
            peak=phases[tightest],
            tightest=tightest,
            base=rest + (linear // gpus if shard else linear),
            gradients=round(2 * away * 2 * 4 * workload.rank * predictor.adapter),
            updates=round(away * linear * passes) if shard else 0,
            token=round(away * linear) if shard else 0,
        )


def table(found: list[Row]) -> Table:
    """Lay the rows out."""
    shown = Table(title=f"One of several GPUs, {PER_GPU} responses of 512 + 512 tokens each a step", title_justify="left")
    names = ("model", "GPUs", "base on each", "of it kept", "peak", "in", "sent per optimizer step")
    for name in (*names, "received per PPO step, updates", "received per decoded token"):
        shown.add_column(name)
    for row in found:
        held = "a part" if row.shard else "whole"
        sizes = [format_bytes(size) if size else "-" for size in (row.gradients, row.updates, row.token)]
        shown.add_row(row.model, str(row.gpus), held, format_bytes(row.base), format_bytes(row.peak), row.tightest, *sizes)
    return shown


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", default=",".join(GPUS), help="Of the shipped shapes.")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4", help="How linear layers are held.")
    parser.add_argument("--output", type=Path, help="Also write JSON there.")
    options = parser.parse_args()
    held: Any = None if options.quantization == "none" else options.quantization
    console, found = Console(), list[Row]()
    for model in options.models.split(","):
        workload = Workload(model, quantization=held, update_order="in-turn")
        with Predictor(workload, lambda text: None, micros=(1,)) as predictor:
            found += rows(predictor, workload, GPUS[model])
    print_table(console, table(found))
    if options.output is not None:
        options.output.write_text(json.dumps([vars(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
