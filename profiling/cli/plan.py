"""Finds settings with which PPO on a model fits a GPU, and says what each of them costs.

A ladder (`ladder`) says in which order memory is saved. On its first rung that holds the smallest step whatever is not needed
is left out again; then rank, micro-batch and rollout batch grow as far as they fit. What further rungs buy is shown beside.
How the base is held and what is kept where is simulated (`shallow`); every depth, rank and number of rows follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

from hydra_ppo.profiling.cli.ladder import (
    AWAY,
    BASE_NF4,
    EIGHT_BIT,
    EMBEDDINGS_INT8,
    EMBEDDINGS_NF4,
    EVERY,
    KV_INT8,
    OFFLOADED,
    Saving,
    exact,
    pruned,
    rungs,
    savings_of,
    with_savings,
)
from hydra_ppo.profiling.cli.predictor import Predictor
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.workload import Workload

CONTEXT_BYTES, FRAGMENTATION = round(0.4 * 2**30), 0.03
"""What a GPU loses to the CUDA context and to gaps in the allocator: a constant, and a share. Rules of thumb."""

HOLDS = (None, "int8", "nf4")
ROLLOUT_BATCHES = (4, 8, 16, 32, 64)
MICROBATCHES = (1, 2, 4, 8, 16)
RANKS = (8, 16, 32, 64)
BASE_RANK = 16

SETTINGS = (
    *("quantization", "rank", "trunk_layers", "checkpointing", "microbatch", "rollout_batch", "world", "shard_base"),
    *(
        "quantize_embeddings",
        "optimizer",
        "update_order",
        "offload_in_rollout",
        "checkpoint_offload",
        "tile_tokens",
        "kv_cache",
    ),
)
"""Of a workload, those that the search decides."""


@dataclass(frozen=True)
class Plan:
    """One set-up that fits.

    Attributes:
        settings: `SETTINGS` by name.
        savings: those among them that save memory, with what they cost.
        phases: predicted peak by phase, bytes.
        margin_bytes: left of the GPU above the peak.
        why: what each saving is needed for, and what the next better value of a setting would need.
        workload: the same as a workload.
    """

    settings: dict[str, Any]
    savings: list[Saving]
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
        parameters: of the base, which is the critic's too.
        plans: the one that costs least first, then what costs more and buys more.
        smallest: where nothing fits the set-up that needs least, else the first plan.
    """

    gpu_bytes: int
    usable_bytes: int
    parameters: int
    plans: list[Plan]
    smallest: Plan

    def as_json(self, count: int) -> dict[str, Any]:
        """Return what `--json` prints."""
        missing = max(0, self.smallest.peak_bytes - self.usable_bytes)
        return {
            "gpu_bytes": self.gpu_bytes,
            "usable_bytes": self.usable_bytes,
            "critic_parameters": self.parameters,
            "plans": [_plan_json(plan) for plan in self.plans[:count]],
            "smallest": _plan_json(self.smallest),
            "missing_bytes": missing,
        }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return plan.settings | {
        "peak_bytes": plan.peak_bytes,
        "phases": plan.phases,
        "margin_bytes": plan.margin_bytes,
        "savings": [{"setting": s.name, "exactness": s.exactness, "speed": s.speed} for s in plan.savings],
        "why": plan.why,
    }


def search(
    workload: Workload,
    gpu_bytes: int,
    margin: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    workers: int = 1,
) -> Search:
    """Search set-ups that fit.

    Args:
        workload: model, compute type, lengths and processes, one on each GPU; everything else is searched. With several, each
            holds the whole base where that fits, else a part.
        gpu_bytes: memory of a GPU.
        margin: bytes to keep free; None is `CONTEXT_BYTES` and the share `FRAGMENTATION`.
        say: takes a line about what is being simulated.
        workers: processes that simulate.
    """
    return search_cards(workload, [gpu_bytes], margin, say, workers)[0]


def search_cards(
    workload: Workload,
    cards: Sequence[int],
    margin: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    workers: int = 1,
) -> list[Search]:
    """Search set-ups that fit each of several GPUs, whose simulations are shared; arguments as of `search`."""
    results = []
    with Predictor(workload, say, MICROBATCHES, workers) as predictor:
        for gpu_bytes in cards:
            found = _search(workload, predictor, gpu_bytes, margin)
            if not found.plans and workload.world > 1:  # which sends more, so only where it has to be
                found = _search(replace(workload, shard_base=True), predictor, gpu_bytes, margin)
            results.append(found)
    return results


def _search(workload: Workload, predictor: Predictor, gpu_bytes: int, margin: int | None) -> Search:
    usable = gpu_bytes - (CONTEXT_BYTES + round(FRAGMENTATION * gpu_bytes) if margin is None else margin)
    least = replace(workload, rank=_ranks(BASE_RANK)[0], rollout_batch=_batches(workload)[0], microbatch=1, score_batch=1)
    small = replace(least, rank=min(RANKS))
    all_exact = exact(workload, predictor.moments(least.rank))
    ladder = rungs(all_exact, [held for held in HOLDS if held != "int8" or not workload.shard_base])
    starts = [(least, rung) for rung in ladder]
    starts += [(small, ladder[-1]), (replace(small, trunk_layers=predictor.layers // 2), ladder[-1])]

    found: list[Workload] = []
    possible = [(start, rung) for start, rung in starts if predictor.least(with_savings(start, rung)) <= usable]
    for number, (start, rung) in enumerate(possible):
        predictor.begin(with_savings(*soon) for soon in possible[number : number + 2])
        if not predictor.fits(with_savings(start, rung), usable):
            continue
        needed = pruned(
            rung,
            lambda fewer, start=start: predictor.fits(with_savings(start, fewer), usable),
            lambda soon, start=start: _begin(predictor, (with_savings(start, fewer) for fewer in soon), usable),
        )
        further_on = _further(needed, all_exact)
        _begin(predictor, _with_and_without_recomputing(with_savings(start, each) for each in (needed, *further_on)), usable)
        found.append(_largest(with_savings(start, needed), predictor, usable))
        for further in further_on:
            larger = _largest(with_savings(start, further), predictor, usable)
            if points(larger) > points(found[-1]):
                found.append(larger)
        break
    plans = [_plan(each, predictor, gpu_bytes, usable, explain=each is found[0]) for each in found]
    smallest = with_savings(*starts[-1])
    least_plan = plans[0] if plans else _plan(smallest, predictor, gpu_bytes, usable, explain=False)
    return Search(gpu_bytes, usable, predictor.parameters, plans, least_plan)


def _begin(predictor: Predictor, soon: Iterable[Workload], usable: int) -> None:
    """Begin to simulate those of the set-ups that are not out of the question."""
    predictor.begin(workload for workload in soon if predictor.least(workload) <= usable)


def _with_and_without_recomputing(shapes: Iterable[Workload]) -> Iterator[Workload]:
    """Yield the shapes, and those that `_largest` tries beside them."""
    for shape in shapes:
        yield shape
        if not shape.checkpoint_offload:
            yield replace(shape, checkpointing=False)


def _batches(workload: Workload) -> Sequence[int]:
    """Return the rollout batches to try, of all processes."""
    return [rows * workload.world for rows in ROLLOUT_BATCHES]


def _ranks(least: int) -> Sequence[int]:
    """Return the ranks from that one on; the largest where there is none."""
    return [rank for rank in RANKS if rank >= least] or [max(RANKS)]


def _further(needed: Sequence[Saving], all_exact: Sequence[Saving]) -> list[list[Saving]]:
    """Return what could be saved beyond what is needed, rung by rung: what is exact, what rounds a little, a base in nf4."""
    taken, further = list(needed), []
    for more in (all_exact, (KV_INT8, EMBEDDINGS_INT8), (BASE_NF4,) if "nf4" in HOLDS else ()):
        # A head in nf4 is smaller than one in int8, and stays.
        new = [saving for saving in more if saving not in taken and not (saving is EMBEDDINGS_INT8 and EMBEDDINGS_NF4 in taken)]
        if new:
            taken = sorted([*taken, *new], key=EVERY.index)
            further.append(taken)
    return further


def _largest(start: Workload, predictor: Predictor, usable: int) -> Workload:
    """Return the best of the set-ups that fit and hold and keep things as `start`, which fits, does.

    Sampling limits the rollout batch and updating the micro-batch, each on its own, so each is searched on its own.
    """
    found = [start]
    for checkpointing in (True,) if start.checkpoint_offload else (True, False):
        batches: Sequence[int] = _batches(start)
        micros: Sequence[int] = MICROBATCHES
        for rank in _ranks(start.rank):
            shape = replace(start, rank=rank, checkpointing=checkpointing)
            micros = _up_to_the_last(micros, lambda m, shape=shape: predictor.training(replace(shape, microbatch=m)) <= usable)
            if not micros:
                break
            batches = _up_to_the_last(
                batches, lambda b, shape=shape: predictor.rollout(replace(shape, rollout_batch=b)) <= usable
            )
            if not batches:
                break
            micro = min(micros[-1], batches[-1] // start.world)
            best = replace(shape, microbatch=micro, score_batch=micro, rollout_batch=batches[-1])
            if max(predictor.with_loading(best).values()) <= usable:  # an update holds the rollout's data
                found.append(best)
    return max(found, key=points)


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
    """Return how much a set-up does at once: one point per doubling of a batch, and what the rest is worth in doublings.

    No recomputation is worth one (it saves about a quarter of an update); ranks from 16 on are little more than nothing, less
    than 16 costs one.
    """
    return (
        log2(workload.rollout_batch)
        + log2(workload.microbatch)
        + (0.0 if workload.checkpointing else 1.0)
        + (-1.0 if workload.rank < BASE_RANK else 0.1 * log2(workload.rank / BASE_RANK))
    )


def _plan(workload: Workload, predictor: Predictor, gpu_bytes: int, usable: int, explain: bool) -> Plan:
    phases = predictor.with_loading(workload)
    return Plan(
        settings={name: value for name, value in asdict(workload).items() if name in SETTINGS},
        savings=savings_of(workload),
        phases=phases,
        margin_bytes=gpu_bytes - max(phases.values()),
        why=_why(workload, predictor, usable) if explain else [],
        workload=workload,
    )


def _why(workload: Workload, predictor: Predictor, usable: int) -> list[str]:
    """Say what each saving is needed for, and what stands in the way of the next better value of each other setting."""
    default = replace(workload, **{name: getattr(Workload("any"), name) for saving in EVERY for name in saving.changes})
    batches = _batches(workload)
    savings = savings_of(workload)
    other_ways = [
        (f"without {saving.name}", with_savings(default, [other for other in savings if other is not saving]))
        for saving in savings
    ]
    if OFFLOADED in savings or AWAY in savings:
        others = [saving for saving in savings if saving not in (OFFLOADED, AWAY)]
        other_ways.append((f"{EIGHT_BIT.name} in its place", with_savings(default, [*others, EIGHT_BIT])))
    if workload.trunk_layers:
        other_ways.append(("adapters on all layers", replace(workload, trunk_layers=0)))
    for setting, values in (("rank", RANKS), ("microbatch", MICROBATCHES), ("rollout_batch", batches)):
        larger = [value for value in values if value > getattr(workload, setting)]
        if larger:
            other_ways.append((f"{setting} {larger[0]}", replace(workload, **{setting: larger[0]})))
    if workload.checkpointing and not workload.checkpoint_offload:
        other_ways.append(("no checkpointing", replace(workload, checkpointing=False)))
    lines = []
    other_ways = [(name, other) for name, other in other_ways if other.microbatch <= other.rollout_batch // other.world]
    _begin(predictor, (other for _, other in other_ways), usable)
    for name, other in other_ways:
        if (least := predictor.least(other)) > usable:
            lines.append(f"{name}: {format_bytes(least)} of linear layers alone do not fit")
            continue
        need = max(predictor.with_loading(other).values())
        fits = "fits too" if name.endswith("in its place") else "fits too, but costs more than it brings elsewhere"
        verdict = "does not fit" if need > usable else fits
        lines.append(f"{name} would need {format_bytes(need)}: {verdict}")
    return lines
