"""Finds settings with which PPO on a model fits a GPU, and says what each of them costs.

How the base is held and what is recomputed is simulated (`shallow`); every depth, rank and number of rows follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from hydra_ppo.compute.logprobs import CHUNK_BYTES
from hydra_ppo.profiling.measuring.capture import WARM_UP
from hydra_ppo.profiling.measuring.recording import Scale
from hydra_ppo.profiling.measuring.shallow import Step, any_scale, simulated_step
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES, model_config
from hydra_ppo.profiling.workload import Workload

CONTEXT_BYTES, FRAGMENTATION = round(0.4 * 2**30), 0.03
"""What a GPU loses to the CUDA context and to gaps in the allocator: a constant, and a share. Rules of thumb."""

HOLDS = (None, "int8", "nf4")
ROLLOUT_BATCHES = (4, 8, 16, 32, 64)
MICROBATCHES = (1, 2, 4, 8, 16)
RANKS = (8, 16, 32, 64)
BASE_RANK = 16

POINTS_OF_HOLD = {None: 2.0, "int8": 0.5, "nf4": 0.0}


@dataclass(frozen=True)
class Plan:
    """One set-up that fits.

    Attributes:
        settings: quantization, rank, trunk_layers, checkpointing, microbatch, rollout_batch.
        phases: predicted peak by phase, bytes.
        margin_bytes: left of the GPU above the peak.
        why: for each setting that could be better, what the next better value would need.
        workload: the same as a workload.
    """

    settings: dict[str, Any]
    phases: dict[str, int]
    margin_bytes: int
    why: list[str]
    workload: Workload

    @property
    def peak_bytes(self) -> int:
        """Highest predicted peak."""
        return max(self.phases.values())


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        gpu_bytes, usable_bytes: of the GPU, and without the margin.
        plans: best first.
        smallest: the set-up that needs least, whether it fits or not.
    """

    gpu_bytes: int
    usable_bytes: int
    plans: list[Plan]
    smallest: Plan

    def as_json(self, count: int) -> dict[str, Any]:
        """Return what `--json` prints."""
        missing = max(0, self.smallest.peak_bytes - self.usable_bytes)
        return {
            "gpu_bytes": self.gpu_bytes,
            "usable_bytes": self.usable_bytes,
            "plans": [_plan_json(plan) for plan in self.plans[:count]],
            "smallest": _plan_json(self.smallest),
            "missing_bytes": missing,
        }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return plan.settings | {
        "peak_bytes": plan.peak_bytes,
        "phases": plan.phases,
        "margin_bytes": plan.margin_bytes,
        "why": plan.why,
    }


class Predictor:
    """Predicts the peaks of set-ups of one model and one length, from simulations that many of them share.

    Args:
        workload: model, compute type and lengths.
        say: takes a line about what is being simulated.
    """

    def __init__(self, workload: Workload, say: Callable[[str], None]) -> None:
        self.say = say
        self.config = model_config(workload.model)
        self.layers: int = self.config.num_hidden_layers
        self._known: dict[Workload, Step] = {}

    def phases(self, workload: Workload) -> dict[str, int]:
        """Return the predicted peak of each phase, bytes; loading, which comes once and before, is left out."""
        scale = Scale(workload.rollout_batch, workload.microbatch, workload.rank)
        with _blocks_of_a_gpu():
            found = self._step(workload).phases(self.layers, scale, workload.trunk_layers)
        return {phase: size for phase, size in found.items() if phase not in ("load", WARM_UP)}

    def rollout(self, workload: Workload) -> int:
        """Return the predicted peak of sampling, which depends on the rollout batch."""
        return self.phases(workload)["rollout"]

    def training(self, workload: Workload) -> int:
        """Return the predicted peak of scoring and updating, which depends on the micro-batch."""
        return max(size for phase, size in self.phases(workload).items() if phase != "rollout")

    def knows(self, workload: Workload) -> bool:
        """Return whether its prediction needs no new simulation."""
        return any_scale(workload) in self._known

    def _step(self, workload: Workload) -> Step:
        shape = any_scale(workload)
        if shape not in self._known:
            recompute = "recomputing" if shape.checkpointing else "keeping activations"
            self.say(f"simulating {shape.model}, {shape.quantization or 'unquantised'}, {recompute}")
            self._known[shape] = simulated_step(shape, self.config, MICROBATCHES)
        return self._known[shape]


@contextmanager
def _blocks_of_a_gpu() -> Iterator[None]:
    """Compute log-probs of fake tensors, which say that they are on a CPU, in the blocks that a GPU takes: larger and fewer."""
    before = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = CHUNK_BYTES["cuda"]
    try:
        yield
    finally:
        CHUNK_BYTES["cpu"] = before


def search(
    workload: Workload, gpu_bytes: int, margin: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Search:
    """Search set-ups that fit.

    Args:
        workload: model, compute type and lengths; everything else is searched.
        gpu_bytes: memory of the GPU.
        margin: bytes to keep free; None is `CONTEXT_BYTES` and the share `FRAGMENTATION`.
        say: takes a line about what is being simulated.
    """
    usable = gpu_bytes - (CONTEXT_BYTES + round(FRAGMENTATION * gpu_bytes) if margin is None else margin)
    predictor = Predictor(workload, say)

    least = replace(workload, rank=min(RANKS), rollout_batch=min(ROLLOUT_BATCHES), microbatch=1, score_batch=1)
    best: list[Workload] = []
    for trunk in (0, predictor.layers // 2):
        for hold in HOLDS:
            start = replace(least, quantization=hold, trunk_layers=trunk)
            if max(predictor.phases(start).values()) <= usable:
                for checkpointing in (True, False):
                    best += _largest(replace(start, checkpointing=checkpointing), predictor, usable)
        if best:
            break  # a trunk is worth its price only where nothing fits without
    best.sort(key=points, reverse=True)
    plans = [_plan(candidate, predictor, gpu_bytes, usable, explain=candidate is best[0]) for candidate in best]
    smallest = replace(least, quantization="nf4", trunk_layers=predictor.layers // 2)
    return Search(gpu_bytes, usable, plans, _plan(smallest, predictor, gpu_bytes, usable, explain=False))


def _largest(start: Workload, predictor: Predictor, usable: int) -> list[Workload]:
    """Return the best of the set-ups that fit with the base held as in `start`, or [].

    Sampling limits the rollout batch and updating the micro-batch, each on its own, so each is searched on its own.
    """
    found = []
    batches: Sequence[int] = ROLLOUT_BATCHES
    micros: Sequence[int] = MICROBATCHES
    for rank in RANKS:
        shape = replace(start, rank=rank)
        micros = _up_to_the_last(micros, lambda m, shape=shape: predictor.training(replace(shape, microbatch=m)) <= usable)
        batches = _up_to_the_last(batches, lambda b, shape=shape: predictor.rollout(replace(shape, rollout_batch=b)) <= usable)
        if not micros or not batches:
            break
        micro = min(micros[-1], batches[-1])
        found.append(replace(shape, microbatch=micro, score_batch=micro, rollout_batch=batches[-1]))
    return [max(found, key=points)] if found else []


def _up_to_the_last(values: Sequence[int], fits: Callable[[int], bool]) -> Sequence[int]:
    """Return the values up to the largest that fits, where each that is smaller than one that fits does too.

    The largest is tried first: on a GPU with room, and at the next rank, that is all that it takes.
    """
    low, high = -1, len(values)  # everything up to `low` fits, nothing from `high` on
    probe = high - 1
    while high - low > 1:
        if fits(values[probe]):
            low = probe
        else:
            high = probe
        probe = (low + high) // 2
    return values[: low + 1]


def points(workload: Workload) -> float:
    """Return how good a set-up is: one point per doubling of a batch, and what the rest is worth in doublings.

    A base that is not rounded is worth two doublings; no recomputation one (it saves about a quarter of an update); ranks from
    16 on little more than nothing, less than 16 costs one; a trunk, which leaves half the layers without adapters, costs four.
    """
    return (
        log2(workload.rollout_batch)
        + log2(workload.microbatch)
        + POINTS_OF_HOLD[workload.quantization]
        + (0.0 if workload.checkpointing else 1.0)
        + (-1.0 if workload.rank < BASE_RANK else 0.1 * log2(workload.rank / BASE_RANK))
        - (4.0 if workload.trunk_layers else 0.0)
    )


def _plan(workload: Workload, predictor: Predictor, gpu_bytes: int, usable: int, explain: bool) -> Plan:
    phases = predictor.phases(workload)
    names = ("quantization", "rank", "trunk_layers", "checkpointing", "microbatch", "rollout_batch")
    peak = max(phases.values())
    return Plan(
        settings={name: value for name, value in asdict(workload).items() if name in names},
        phases=phases,
        margin_bytes=gpu_bytes - peak,
        why=_why(workload, predictor, usable, explain),
        workload=workload,
    )


def _why(workload: Workload, predictor: Predictor, usable: int, simulate: bool) -> list[str]:
    """Say for each setting what stands in the way of its next better value; what is unknown is simulated, or left out."""
    better: list[tuple[str, Workload]] = []
    if (hold := HOLDS.index(workload.quantization)) > 0:
        name = HOLDS[hold - 1] or "no quantization"
        better.append((name, replace(workload, quantization=HOLDS[hold - 1])))
    if workload.trunk_layers:
        better.append(("adapters on all layers", replace(workload, trunk_layers=0)))
    for setting, values in (("rank", RANKS), ("microbatch", MICROBATCHES), ("rollout_batch", ROLLOUT_BATCHES)):
        larger = [value for value in values if value > getattr(workload, setting)]
        if larger:
            better.append((f"{setting} {larger[0]}", replace(workload, **{setting: larger[0]})))
    if workload.checkpointing:
        better.append(("no checkpointing", replace(workload, checkpointing=False)))
    lines = []
    for name, other in better:
        if other.microbatch > other.rollout_batch:
            continue
        if not (simulate or predictor.knows(other)):
            continue
        need = max(predictor.phases(other).values())
        verdict = "does not fit" if need > usable else "fits too, but costs more than it brings elsewhere"
        lines.append(f"{name} would need {format_bytes(need)}: {verdict}")
    return lines


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
        title=f"Set-ups that fit {usable} usable of {format_bytes(found.gpu_bytes)}, best first", title_justify="left"
    )
    for name in ("base", "rank", "trunk", "recompute", "micro", "rollout", "peak", "in", "left"):
        table.add_column(name)
    for plan in found.plans[:count]:
        w = plan.workload
        tightest = max(plan.phases, key=lambda phase: plan.phases[phase])
        table.add_row(
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
    console.print(table)
    best = found.plans[0]
    phases = ", ".join(f"{phase} {format_bytes(size)}" for phase, size in best.phases.items())
    console.print(f"The first, by phase: {phases}.", highlight=False)
    console.print("Why not more of it:")
    for line in best.why:
        console.print(f"  {line}", highlight=False)


def _describe(plan: Plan) -> str:
    return ", ".join(f"{name}={value}" for name, value in plan.settings.items())


def write_yaml(plan: Plan, path: Path) -> None:
    """Write the plan as settings of `hydra-ppo ppo`; model, data and output are to be filled in."""
    workload = plan.workload
    settings = {
        "model": {
            "name_or_path": HUB_NAMES.get(workload.model.lower(), workload.model),
            "quantization": workload.quantization,
            "dtype": workload.dtype,
            "trunk_layers": workload.trunk_layers,
            "gradient_checkpointing": workload.checkpointing,
            "lora": {"r": workload.rank, "alpha": 2 * workload.rank},
        },
        "data": {"train": "prompts.jsonl", "max_prompt_tokens": workload.prompt},
        "run": {"output": "runs/ppo"},
        "rollout": {
            "batch_size": workload.rollout_batch,
            "max_new_tokens": workload.response,
            "score_batch_size": workload.score_batch,
        },
        "minibatch_size": min(workload.rollout_batch, 16),
        "microbatch_size": workload.microbatch,
    }
    head = (
        f"# Planned by simulation: peak {format_bytes(plan.peak_bytes)}, {format_bytes(plan.margin_bytes)} of the GPU left.\n"
        "# model.name_or_path: the run folder of hydra-ppo sft on this base. lora: counts where that run trained no adapter.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
