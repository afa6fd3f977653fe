"""Lets PPO trainers take turns at the same update: `python -m hydra_ppo.profiling.benchmarks.peers.run --workload w1`.

Every contestant is a process that is built once. In each round each of them does one update while the others wait, so
that whatever slows the machine down hits all alike. A first update warms up and is not counted; the last one is measured
for its peak instead of timed, because counting tensors slows it down. All of it runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import hydra_ppo.memory
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.profiling.benchmarks.peers.environments import Environment, prepare
from hydra_ppo.profiling.benchmarks.peers.processes import Worker
from hydra_ppo.profiling.benchmarks.peers.results import Result, collect, table, write
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, Contestant, Workload, contestants

OURS = "hydra"
DONE, FAILED, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: done, failed (an installation or a contestant) or bad input."""
    options = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        workload = WORKLOADS[options.workload]
        chosen = choose(workload, options.only)
        if options.rounds < 0:
            raise ConfigError(f"rounds={options.rounds} must not be negative; 0 measures peaks alone.")
        if options.threads < 1:
            raise ConfigError(f"threads={options.threads} must be at least 1; use the number of cores that are free.")
        places = prepare(options.environments, {c.environment for c in chosen}, console.print)
        results = compare(workload, chosen, places, options.dtype, options.rounds, options.threads, console)
    except HydraError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return BAD_INPUT if isinstance(error, ConfigError) else FAILED
    write(results, options.output)
    title = f"One PPO update, {workload.name}, {options.dtype}, {options.threads} threads, {options.rounds} rounds"
    Console().print(table(results, title))
    console.print(f"written to {options.output}", highlight=False)
    return DONE


def choose(workload: Workload, only: Sequence[str]) -> list[Contestant]:
    """Return the contestants named, in the order of all; all where none is.

    Raises:
        ConfigError: for a name that is not one of them.
    """
    known = contestants(workload)
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"only={unknown[0]!r} is no contestant of {workload.name}; choose among {', '.join(known)}.")
    return [contestant for name, contestant in known.items() if not only or name in only]


def compare(
    workload: Workload,
    chosen: Sequence[Contestant],
    places: dict[str, Environment],
    dtype: str,
    rounds: int,
    threads: int,
    console: Console,
) -> list[Result]:
    """Run all contestants in turn and return their results.

    Args:
        rounds: counted updates of each.
        threads: of each worker; only one computes at a time.
    """
    with ExitStack() as stack:
        workers = []
        for contestant in chosen:
            console.print(f"building {contestant.name}", highlight=False)
            place = places[contestant.environment]
            command = [place.python, str(Path(__file__).parent / contestant.script)]
            command.append(json.dumps(_spec(contestant, workload, dtype, rounds, threads)))
            workers.append(stack.enter_context(Worker(contestant.name, command, _variables(place, threads))))
        for number in range(rounds + 1):
            for worker in workers:
                seconds = worker.ask("update")["seconds"]
                turn = f"round {number} of {rounds}" if number else "warm-up"
                console.print(f"{turn}: {worker.name} {seconds:.3f} s", highlight=False)
        for worker in workers:
            console.print(f"measuring {worker.name}", highlight=False)
            worker.ask("measure")
        return collect({worker.name: worker.ask("quit") for worker in workers}, OURS, threads)


def _spec(contestant: Contestant, workload: Workload, dtype: str, rounds: int, threads: int) -> dict[str, Any]:
    return {
        "name": contestant.name,
        "workload": asdict(workload),
        "dtype": dtype,
        "options": contestant.options,
        "updates": rounds + 2,  # the warm-up and the measured one
        "threads": threads,
        "memory_module": hydra_ppo.memory.__file__,
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
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w1", help="w1 is for time, w2 for memory")
    parser.add_argument("--rounds", type=int, default=5, help="counted updates of each contestant; 0 measures peaks alone")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants, all by default")
    parser.add_argument("--threads", type=int, default=2, help="threads of the worker whose turn it is")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/peers.json"), help="results, as a JSON list")
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="where peers are installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
