"""What `hydra-ppo profile` and `hydra-ppo plan` do, once their arguments are known."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console

from hydra_ppo.profiling.measuring.record import Record, versions
from hydra_ppo.profiling.reporting.report import format_bytes, format_count, print_record
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.runtime.tables import print_table

MOST_WORKERS = 4
"""Processes that simulate for `plan`: more set-ups than that are seldom known to be wanted at once."""


def profile(
    workload: Workload,
    methods: Sequence[str],
    *,
    stage: Literal["ppo", "reward", "sft"],
    simulate: bool,
    device: str,
    timed_steps: int,
    output: Path | None,
    as_json: bool,
    as_table: bool,
) -> Record:
    """Capture every method and show the result.

    Args:
        workload: model and sizes.
        methods: in the order of the table.
        stage: ppo, reward or sft.
        simulate: use fake tensors.
        device, timed_steps: of real runs.
        output: folder for record, pictures and report.
        as_json: print JSON instead of tables.
        as_table: print a comparison even of a single method (`{"methods": ...}` in JSON).
    """
    from hydra_ppo.profiling.measuring.capture import capture

    console = Console(stderr=True)
    workload.check_stage(stage)
    for method in methods:
        workload.check_method(method)
    profiles = []
    for number, method in enumerate(methods, start=1):
        doing = "simulating" if simulate else "running"
        with console.status(f"{number}/{len(methods)} {doing} {method} on {workload.model}"):
            found = capture(
                workload,
                method,
                simulate=simulate,
                stage=stage,
                device=device,
                timed_steps=timed_steps,
                snapshot_to=None if output is None else output / f"allocator-{method}.pickle",
            )
        console.print(f"{method}: peak {format_bytes(found.peak_bytes)} in {found.seconds:.0f} s", highlight=False)
        profiles.append(found)
    record = Record(profiles, versions())
    _show(record, output, as_json, as_table)
    if stage == "ppo" and not as_json:
        from hydra_ppo.profiling.cli.predictor import parameters
        from hydra_ppo.profiling.subjects.shapes import model_config

        size = f"{format_count(parameters(model_config(workload.model))[0])} parameters (the base), in each method"
        print(f"critic: {size if workload.advantage == 'gae' else f'none with advantage={workload.advantage}'}")
    return record


def redraw(path: Path, output: Path | None, as_json: bool, many: bool) -> None:
    """Show a saved record again."""
    record = Record.load(path)
    _show(record, output, as_json, many or len(record.profiles) > 1)


def _show(record: Record, output: Path | None, as_json: bool, as_table: bool) -> None:
    if output is not None:
        write_report(record, output)
    if as_json:
        summaries = {profile.method: profile.summary() for profile in record.profiles}
        print(json.dumps({"methods": summaries} if as_table else record.profiles[0].summary(), indent=2))
    else:
        print_record(record, Console())
        if output is not None:
            print(f"Written to {output}: record.json, report.html and pictures.")


def write_report(record: Record, folder: Path) -> None:
    """Write record.json, one timeline per method, comparison.png and report.html."""
    from hydra_ppo.profiling.reporting.html import write_html
    from hydra_ppo.profiling.reporting.pictures import draw_comparison, draw_timeline

    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / "record.json")
    for found in record.profiles:
        if found.timeline is not None:
            draw_timeline(found, folder / f"timeline-{found.method}.png")
    draw_comparison(record.profiles, folder / "comparison.png")
    write_html(record, folder / "report.html")


def learning(
    output: Path | None, methods: Sequence[str], seeds: Sequence[int], trunk_layers: Sequence[int], as_json: bool
) -> None:
    """Train every method on the quickstart's task and print how it did; several trunks are drawn too, to `trunk.png`."""
    from hydra_ppo.profiling.learning.compare import compare_learning, learning_table
    from hydra_ppo.profiling.learning.picture import draw_trunks

    folder = output or Path("runs/learning")
    say = Console(stderr=True, highlight=False).print
    with redirect_stdout(sys.stderr):  # the commands that train say where they saved
        outcomes = compare_learning(folder, methods, seeds, trunk_layers, say=say)
    if len(set(trunk_layers)) > 1:
        say(f"Drawn to {draw_trunks(outcomes, folder / 'trunk.png')}")
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        print_table(Console(), learning_table(outcomes))


def init(workload: Workload, memory: int | None, folder: Path) -> int:
    """Write a project folder with settings that fit the card; return 3 where nothing fits, and write nothing.

    Args:
        workload: model, compute type and lengths.
        memory: of the card; None is that of the GPU at hand, and leaves sizes at their defaults where there is none.
        folder: to write to.
    """
    import torch

    from hydra_ppo.profiling.cli.plan import search
    from hydra_ppo.profiling.cli.plan_report import print_plans
    from hydra_ppo.profiling.cli.project import NO_CARD, write_project
    from hydra_ppo.profiling.cli.recipe import make_recipe

    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    recipe = None
    if memory is not None:
        with Console(stderr=True).status(f"simulating {workload.model}") as status:
            workers = min(os.cpu_count() or 1, MOST_WORKERS)
            found = search(workload, memory, say=lambda text: status.update(text), workers=workers)
            recipe = make_recipe(found)
        if recipe is None:
            print_plans(found, 1, Console())
            return 3
    files = write_project(folder, recipe, workload)
    for line in [NO_CARD] if recipe is None else recipe.lines():
        print(line)
    print(f"Written to {folder}: {', '.join(path.name for path in files)}. README.md says how to go on.")
    return 0


def plan(workload: Workload, memory: int, margin: int | None, count: int, output: Path | None, as_json: bool) -> int:
    """Search set-ups that fit, print the best, and write the first as YAML; return 3 where nothing fits."""
    from hydra_ppo.profiling.cli.plan import search
    from hydra_ppo.profiling.cli.plan_report import print_plans, write_yaml

    console = Console(stderr=True)
    with console.status(f"simulating {workload.model}") as status:
        workers = min(os.cpu_count() or 1, MOST_WORKERS)
        found = search(workload, memory, margin, say=lambda text: status.update(text), workers=workers)
    plans = found.plans[:count]
    if as_json:
        print(json.dumps(found.as_json(count), indent=2))
    else:
        print_plans(found, count, Console())
    if plans and output is not None:
        write_yaml(plans[0], output)
        line = f"Written to {output}; fill in model, data and output, then: hydra-ppo ppo {output}"
        console.print(line, highlight=False, markup=False)
    return 0 if plans else 3
