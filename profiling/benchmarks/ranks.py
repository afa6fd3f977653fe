"""How much faster several processes are than one, each with one thread: the efficiency of sharing the work out.

    python -m hydra_ppo.profiling.benchmarks.ranks [--sizes 1,2] [--updates 5]

All take turns, an update each, while the others wait; on a machine with as many cores as processes. Prints a table and writes
runs/bench/ranks.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.profiling.benchmarks.peers.workloads import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_RANK, WORKLOADS, Workload
from hydra_ppo.runtime.tables import print_table


class Team:
    """Processes that train together, an update whenever they are told to.

    Args:
        size: processes.
        workload: of each update.
        updates: that they will do.
        shard: share the base out.
    """

    def __init__(self, size: int, workload: Workload, updates: int, shard: bool) -> None:
        self.size = size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            self._pipes.append(mine)
            given = (rank, size, port, workload, updates, shard, theirs)
            context.Process(target=_train, args=given, daemon=True).start()
        self._hear()  # that they are ready

    def update(self) -> dict[str, float]:
        """Do one update; return seconds, and the share of them that processes waited."""
        begun = time.perf_counter()
        for pipe in self._pipes:
            pipe.send("go")
        waiting = self._hear()[0]
        return {"seconds": time.perf_counter() - begun, "waiting": waiting}

    def _hear(self) -> list[Any]:
        return [pipe.recv() for pipe in self._pipes]

    def leave(self) -> None:
        """Let them go."""
        for pipe in self._pipes:
            pipe.send("stop")


def _train(rank: int, size: int, port: int, workload: Workload, updates: int, shard: bool, pipe: Connection) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    import torch
    from transformers import LlamaConfig

    from hydra_ppo.config.settings import KLSettings, LoraSettings, OptimizerSettings, RolloutSettings
    from hydra_ppo.model.sharding import shard_layers
    from hydra_ppo.parallel.joining import join
    from hydra_ppo.profiling.benchmarks.trainers import make_trainer, random_model

    torch.set_num_threads(1)
    world = join(600.0)
    model = random_model(LlamaConfig(**workload.llama()), LoraSettings(r=LORA_RANK, alpha=LORA_ALPHA))
    if shard and size > 1:
        shard_layers(model.causal_lm)
        model.is_sharded = True
    trainer = make_trainer(
        model,
        workload.prompts(workload.rows * updates),
        RolloutSettings(batch_size=workload.rows, max_new_tokens=workload.response_tokens),
        world=world,
        kl=KLSettings(coef=KL_COEF),
        optimizer=OptimizerSettings(learning_rate=LEARNING_RATE),
        steps=updates,
        ppo_epochs=workload.epochs,
        minibatch_size=workload.rows,
        microbatch_size=workload.microbatch,
    )
    with world.session():
        world.together(lambda: None, "ready")
        pipe.send(None)
        step = 0
        while pipe.recv() == "go":
            step += 1
            world.waiting_share()  # not the turns of others
            trainer.step(step)
            pipe.send(world.waiting_share() if size > 1 else 0.0)


def compare(sizes: list[int], workload: Workload, updates: int, shard: bool = False) -> dict[str, Any]:
    """Let teams of these sizes take turns; return median seconds and waiting of each, and speed over the first."""
    teams = [Team(size, workload, updates + 1, shard) for size in sizes]
    for team in teams:
        team.update()  # the first is slower
    turns: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(updates):
        for team in teams:
            turns[team.size].append(team.update())
    for team in teams:
        team.leave()
    first = turns[sizes[0]]
    rows = {}
    for size, found in turns.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(first, found, strict=True)]  # of neighbours in time
        rows[str(size)] = {
            "seconds": median(each["seconds"] for each in found),
            "waiting": median(each["waiting"] for each in found),
            "speed": median(ratios),
            "speeds": ratios,
        }
    machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"workload": workload.name, "shard_base": shard, "updates": updates, "machine": machine, "sizes": rows}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sizes", default="1,2", help="Numbers of processes, such as 1,2,4.")
    parser.add_argument("--updates", type=int, default=5, help="Turns of each.")
    parser.add_argument("--workload", choices=WORKLOADS, default="w1", help="What an update consists of.")
    parser.add_argument("--shard-base", action="store_true", help="Share the base out.")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/ranks.json"))
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    found = compare(sizes, WORKLOADS[options.workload], options.updates, options.shard_base)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    table = Table(title=f"{found['workload']}, one thread a process, {found['machine']['processor']}", title_justify="left")
    for name in ("processes", "seconds an update", "waiting", f"speed, {sizes[0]} process = 1"):
        table.add_column(name)
    for size, row in found["sizes"].items():
        table.add_row(size, f"{row['seconds']:.2f}", f"{row['waiting']:.1%}", f"{row['speed']:.2f}")
    print_table(Console(), table)


if __name__ == "__main__":
    main()
