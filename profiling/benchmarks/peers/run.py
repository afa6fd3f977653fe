"""Lets PPO trainers take turns at the same update: `python -m hydra_ppo.profiling.benchmarks.peers.run --workload w1`.

Every contestant is a process that is built once. In each round each of them does one update while the others wait, so
that whatever slows the machine down hits all alike; an update during which other processes used the machine is done again.
Large matrix products take their turn too: what they reach is the floor under an update's time. A first update warms up and is
not counted; the last one is measured for its bytes instead of timed, because counting tensors slows it down. All of it runs
on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import hydra_ppo.runtime.memory
from hydra_ppo.cli.main import BAD_INPUT, DONE, FAILED
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.profiling.benchmarks.peers.environments import Environment, prepare
from hydra_ppo.profiling.benchmarks.peers.load import PROC, REPEATS, undisturbed
from hydra_ppo.profiling.benchmarks.peers.processes import Worker
from hydra_ppo.profiling.benchmarks.peers.results import Result, collect, floor_table, medians, table, write
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, Contestant, Workload, by_default, contestants, matmul

ALL = ("w1", "w2")

WIDTH = 100
"""Columns that the tables need; in fewer, numbers would be cut short."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: done, failed (an installation or a contestant) or bad input."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True)
    say = partial(console.print, highlight=False, markup=False)
    try:
        workloads = [WORKLOADS[name] for name in (ALL if options.workload == "all" else [options.workload])]
        chosen = choose(workloads, options.only)
        if options.rounds < 0:
            raise ConfigError(f"rounds={options.rounds} must not be negative; 0 measures bytes alone.")
        if options.threads < 1:
            raise ConfigError(f"threads={options.threads} must be at least 1; use the number of cores that are free.")
        if not (PROC / "stat").exists():
            say("this system does not say what other processes use of it: no update is repeated for their sake")
        places = prepare(options.environments, {c.environment for found in chosen.values() for c in found}, say)
        results: list[Result] = []
        for workload in workloads:
            found = compare(workload, chosen[workload.name], places, options.rounds, options.threads, say)
            results += found
            write(results, options.output)
            title = f"One PPO update, {workload.name}, {options.threads} threads, {options.rounds} rounds"
            paper = Console(width=max(WIDTH, Console().width))
            paper.print(table(found, title))
            if floors := floor_table(found, f"Multiply-adds that cannot be left out, {workload.name}"):
                paper.print(floors)
    except HydraError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT if isinstance(error, ConfigError) else FAILED
    say(f"written to {options.output}")
    return DONE


def choose(workloads: Sequence[Workload], only: Sequence[str]) -> dict[str, list[Contestant]]:
    """Return, by workload, the contestants named, in the order of all; those by default where none is named.

    Raises:
        ConfigError: for a name that none of the workloads has, and for a workload that has none of the names.
    """
    known = {name: None for workload in workloads for name in contestants(workload)}  # a set in order
    if unknown := [name for name in only if name not in known]:
        of = " or ".join(workload.name for workload in workloads)
        raise ConfigError(f"only={unknown[0]!r} is no contestant of {of}; choose among {', '.join(known)}.")
    chosen = {}
    for workload in workloads:
        names = only or by_default(workload)
        chosen[workload.name] = [c for name, c in contestants(workload).items() if name in names]
        if not chosen[workload.name]:
            raise ConfigError(f"only={' '.join(only)} leaves nobody for {workload.name}; choose a single workload.")
    return chosen


def compare(
    workload: Workload,
    chosen: Sequence[Contestant],
    places: dict[str, Environment],
    rounds: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Run all contestants in turn and return their results.

    Args:
        rounds: counted updates of each.
        threads: of each worker; only one computes at a time.
        say: takes lines of progress.
    """
    products = {c.dtype: matmul(c.dtype) for c in chosen if c.ours and rounds}
    with ExitStack() as stack:
        workers = {}
        for contestant in (*chosen, *products.values()):
            say(f"building {contestant.name}")
            place = places[contestant.environment]
            command = [place.python, str(Path(__file__).parent / contestant.script)]
            command.append(json.dumps(_spec(contestant, workload, rounds, threads)))
            workers[contestant.name] = stack.enter_context(Worker(contestant.name, command, _variables(place, threads)))
        for worker in workers.values():
            say(f"warm-up: {worker.name} {worker.ask('update')['seconds']:.3f} s")
        turns: dict[str, list[tuple[dict[str, Any], bool | None]]] = {name: [] for name in workers}
        for number in range(1, rounds + 1):
            for name, worker in workers.items():
                answer, load = undisturbed(partial(worker.ask, "update"), worker.pid, say)
                others = "" if load is None else f", others used {load.others:.1%} of the machine"
                say(f"round {number} of {rounds}: {name} {answer['seconds']:.3f} s{others}")
                turns[name].append((answer, None if load is None else load.disturbed))
        reports = {}
        for contestant in chosen:
            say(f"measuring {contestant.name}")
            worker, found = workers[contestant.name], turns[contestant.name]
            worker.ask("measure")
            reports[contestant.name] = {
                **worker.ask("quit"),
                "seconds": [answer["seconds"] for answer, _ in found],
                "phases": [answer["phases"] for answer, _ in found if "phases" in answer],
                "disturbed": [disturbed for _, disturbed in found],
            }
            worker.close()
        rates = {dtype: medians([answer["rates"] for answer, _ in turns[c.name]]) for dtype, c in products.items()}
        return collect(workload, chosen, reports, {dtype: found for dtype, found in rates.items() if found}, threads)


def _spec(contestant: Contestant, workload: Workload, rounds: int, threads: int) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "workload": asdict(workload),
        "dtype": contestant.dtype,
        "options": contestant.options,
        "updates": rounds * (1 + REPEATS) + 2,  # the warm-up and the measured one
        "threads": threads,
        "memory_module": hydra_ppo.runtime.memory.__file__,
    }


def _variables(place: Environment, threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",  # tensors are counted on the CPU, and the peers would go where a GPU is
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **place.variables,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hydra_ppo.profiling.benchmarks.peers.run", description=__doc__.splitlines()[0])
    choices = [*WORKLOADS, "all"]
    parser.add_argument("--workload", choices=choices, default="all", help="w1 is for time, w2 for memory; all is both")
    parser.add_argument("--rounds", type=int, default=3, help="counted updates of each contestant; 0 measures bytes alone")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contestants; all by default, in w2 those in fp32"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the worker whose turn it is")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/peers.json"), help="results, as a JSON list")
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="where peers are installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
