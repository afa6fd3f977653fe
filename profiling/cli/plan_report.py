"""Shows what a search found: a table, what each choice costs, and the settings as YAML of `hydra-ppo ppo`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from hydra_ppo.profiling.cli.ladder import Saving
from hydra_ppo.profiling.cli.plan import Plan, Search
from hydra_ppo.profiling.cli.recipe import model_settings, ppo_settings
from hydra_ppo.profiling.reporting.report import format_bytes, format_count
from hydra_ppo.runtime.tables import print_table


def print_plans(found: Search, count: int, console: Console) -> None:
    """Print the best plans as a table, or by how much the smallest set-up misses."""
    usable = format_bytes(found.usable_bytes)
    if not found.plans:
        least = found.smallest
        missing = format_bytes(least.peak_bytes - found.usable_bytes)
        tightest = max(least.phases, key=lambda phase: least.phases[phase])
        console.print(
            f"Nothing fits {usable} usable of {format_bytes(found.gpu_bytes)}. The smallest set-up ({_describe(least)}) needs "
            f"{format_bytes(least.peak_bytes)}, {missing} too much, in {tightest}. What would have to give: a GPU with "
            f"{missing} more, a smaller model, or shorter prompts and responses (least without them: "
            f"{format_bytes(least.phases['optimizer'])}).",
            highlight=False,
        )
        return
    table = Table(
        title=f"Set-ups that fit {usable} usable of {format_bytes(found.gpu_bytes)}, the one that costs least first",
        title_justify="left",
    )
    for name in ("", "base", "rank", "trunk", "recompute", "micro", "rollout", "peak", "in", "left"):
        table.add_column(name)
    shown = found.plans[:count]
    for number, plan in enumerate(shown, 1):
        w = plan.workload
        tightest = max(plan.phases, key=lambda phase: plan.phases[phase])
        table.add_row(
            str(number),
            w.quantization or w.dtype,
            str(w.rank),
            str(w.trunk_layers),
            "on" if w.checkpointing else "off",
            str(w.microbatch),
            str(w.rollout_batch),
            format_bytes(plan.peak_bytes),
            tightest,
            format_bytes(plan.margin_bytes),
        )
    print_table(console, table)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if (first := shown[0].workload).world > 1:
        held = "a part of each decoder layer" if first.shard_base else "the whole base"
        say(f"{first.world} GPUs, one process each; {held} on each.")
        say("micro: rows of one process; rollout: of all. Start with torchrun --nproc-per-node, see docs/scale.md.")
    kind = found.smallest.workload.advantage
    size = f"{format_count(found.parameters)} parameters (the base)" if kind == "gae" else f"none with advantage={kind}"
    say(f"critic: {size}")
    before: list[Saving] = []
    for number, plan in enumerate(shown, 1):
        new = [saving for saving in plan.savings if saving not in before]
        gone = [saving for saving in before if saving not in plan.savings]
        beside = "" if number == 1 else f", beside what {number - 1} saves"
        say(f"{number} saves memory by{beside}:" if new else f"{number} saves nothing{' more' * (number > 1)}.")
        for saving in new:
            say(f"  {saving.name}: exactness: {saving.exactness}; speed: {saving.speed}")
        if gone:
            say(f"  and does without {', '.join(saving.name for saving in gone)}")
        before = plan.savings
    best = found.plans[0]
    phases = ", ".join(f"{phase} {format_bytes(size)}" for phase, size in best.phases.items())
    say(f"1 by phase: {phases} (load: where each weight is quantised as it is read, as is simulated).")
    say("Why not less of it, or more:" if best.savings else "Why not more of it:")
    for line in best.why:
        say(f"  {line}")


def _describe(plan: Plan) -> str:
    return ", ".join(f"{name}={value}" for name, value in plan.settings.items())


def write_yaml(plan: Plan, path: Path) -> None:
    """Write the plan as settings of `hydra-ppo ppo`; model, data and output are to be filled in."""
    workload = plan.workload
    settings = {
        "model": model_settings(workload),
        "data": {"train": "prompts.jsonl", "max_prompt_tokens": workload.prompt},
        "run": {"output": "runs/ppo"},
        **ppo_settings(workload),
    }
    head = (
        f"# Planned by simulation: peak {format_bytes(plan.peak_bytes)}, {format_bytes(plan.margin_bytes)} of the GPU left.\n"
        "# model.name_or_path: the run folder of hydra-ppo sft on this base. lora: counts where that run trained no adapter.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
