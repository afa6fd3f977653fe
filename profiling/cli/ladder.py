"""What makes a set-up need less memory, and what each of these costs: the ladder that `plan` climbs.

The order is one of preference: what costs neither exactness nor speed; what costs speed alone; what rounds, but hardly costs
speed; and last what a model of some size would notice. Numbers are those that docs/notes.md has, with what they were
measured on; where there is none it is said in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_ppo.profiling.workload import Workload
from hydra_ppo.training.offloaded import BUCKET_BYTES, ROOMS

TILE_TOKENS = 512


@dataclass(frozen=True)
class Saving:
    """One setting that saves memory.

    Attributes:
        name: as it is written in a run's config.
        changes: of the workload.
        exactness, speed: what it costs.
    """

    name: str
    changes: dict[str, Any]
    exactness: str
    speed: str

    def within(self, workload: Workload) -> bool:
        """Return whether a workload has it."""
        return all(getattr(workload, name) == value for name, value in self.changes.items())


SAME = "exact, the same bits"

IN_TURN = Saving(
    "update_order=in-turn",
    {"update_order": "in-turn"},
    f"{SAME} (but for fp16 where gradients overflow)",
    "none: the two halves of a step change places",
)
AWAY = Saving(
    "optimizer.offload_in_rollout=true",
    {"offload_in_rollout": True},
    SAME,
    "moments go to the host and come back once in a step of PPO",
)
OFFLOADED = Saving(
    "optimizer.name=adamw-offloaded",
    {"optimizer": "adamw-offloaded", "offload_in_rollout": False},
    SAME,
    "moments come and go with each optimizer step",
)
CHECKPOINTS = Saving(
    "model.checkpoint_offload=true",
    {"checkpoint_offload": True},
    SAME,
    "each layer's input goes to the host and back for each micro-batch and role; 1.01 times the processor time on a CPU",
)
TILES = Saving(
    f"model.tile_tokens={TILE_TOKENS}",
    {"tile_tokens": TILE_TOKENS},
    "exact but for the order of sums",
    "4-bit layers are dequantised once for each piece; 0.95 times the processor time of an update on a CPU, nf4",
)
EIGHT_BIT = Saving(
    "optimizer.name=adamw-8bit",
    {"optimizer": "adamw-8bit", "offload_in_rollout": False},
    "moments are rounded to 8 bits; no worse on the quickstart's task (docs/results.md)",
    "no known one",
)
KV_INT8 = Saving(
    "rollout.kv_cache=int8",
    {"kv_cache": "int8"},
    "the sampler's log-probs are off by 0.015 nats a token (SmolLM2-135M, fp32); computing in bf16 alone is off by 0.042",
    "a pass over at most 16 rows a step, which measures the drift; more where it is large",
)
EMBEDDINGS_INT8 = Saving(
    "model.quantize_embeddings=int8",
    {"quantize_embeddings": "int8"},
    "log-probs move by 0.026 nats (SmolLM2-135M); computing in bf16 alone moves them by 0.025",
    "the head is expanded block by block in each pass and for each sampled token; not measured",
)
BASE_INT8 = Saving(
    "model.quantization=int8",
    {"quantization": "int8"},
    "the base's linear layers are rounded to 8 bits; not measured here",
    "its products keep their inputs in spite of recomputation; not measured",
)
BASE_NF4 = Saving(
    "model.quantization=nf4",
    {"quantization": "nf4"},
    "the base's linear layers are rounded to 4 bits; not measured here",
    "each layer is expanded for each product; not measured on a GPU",
)
EMBEDDINGS_NF4 = Saving(
    "model.quantize_embeddings=nf4",
    {"quantize_embeddings": "nf4"},
    "log-probs move by 0.50 nats (SmolLM2-135M), twenty times what computing in bf16 does",
    "as int8: the head is expanded block by block; not measured",
)

EVERY = (
    *(IN_TURN, AWAY, OFFLOADED, CHECKPOINTS, TILES),
    *(EIGHT_BIT, KV_INT8, EMBEDDINGS_INT8, BASE_INT8, BASE_NF4, EMBEDDINGS_NF4),
)
"""All of them, the one to be taken first in front."""


def exact(workload: Workload, moments: int) -> tuple[Saving, ...]:
    """Return what costs no exactness, all together.

    Args:
        workload: lengths; rows that are hardly longer than a piece are not cut.
        moments: bytes of them; offloaded ones need room on the device to come to, which few would not repay.
    """
    long = workload.prompt + workload.response > 4 * TILE_TOKENS and not workload.shard_base
    away = OFFLOADED if moments > 2 * ROOMS * BUCKET_BYTES else AWAY
    first = (IN_TURN,) if workload.advantage == "gae" else ()
    return (*first, away, CHECKPOINTS, *((TILES,) if long else ()))


def rungs(all_exact: Sequence[Saving], holds: Sequence[str | None]) -> list[tuple[Saving, ...]]:
    """Return the ladder: nothing, all that is exact, what rounds a little, bases in 8 and 4 bits, a coarse head.

    Args:
        all_exact: what costs no exactness.
        holds: in which ways the base may be held.
    """
    rounded = (*all_exact, KV_INT8, EMBEDDINGS_INT8)
    ladder: list[tuple[Saving, ...]] = [(), tuple(all_exact), rounded] if None in holds else []
    ladder += [(*rounded, base) for base in (BASE_INT8, BASE_NF4) if base.changes["quantization"] in holds]
    ladder.append((*all_exact, KV_INT8, BASE_NF4, EMBEDDINGS_NF4))
    return ladder


def with_savings(workload: Workload, savings: Iterable[Saving]) -> Workload:
    """Return the workload with these settings, later ones over earlier ones."""
    changes: dict[str, Any] = {}
    for saving in savings:
        changes |= saving.changes
    return replace(workload, **changes)


def savings_of(workload: Workload) -> list[Saving]:
    """Return what a workload has of them, in order."""
    return [saving for saving in EVERY if saving.within(workload)]


def pruned(
    savings: Sequence[Saving],
    fits: Callable[[Sequence[Saving]], bool],
    ahead: Callable[[list[list[Saving]]], None] = lambda soon: None,
) -> tuple[Saving, ...]:
    """Return those that are needed: the dearest is left out first, and what still fits without it stays without.

    Args:
        savings: which together fit.
        fits: asked for fewer, or cheaper ones.
        ahead: told what it may be asked for next.
    """
    kept = list(savings)
    order = sorted(savings, key=EVERY.index, reverse=True)
    for number, saving in enumerate(order):
        ahead([[other for other in kept if other is not left_out] for left_out in order[number : number + 2]])
        without = [other for other in kept if other is not saving]
        if fits(without):
            kept = without
        elif saving is OFFLOADED and fits(cheaper := [AWAY if other is saving else other for other in kept]):
            kept = cheaper
    return tuple(sorted(kept, key=EVERY.index))
