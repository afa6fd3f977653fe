"""What a plan makes of a model and a card: the settings of both trainings, and what they peak at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from hydra_ppo.profiling.cli.ladder import TILE_TOKENS
from hydra_ppo.profiling.cli.plan import Plan, Search
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES
from hydra_ppo.profiling.workload import Workload

PAIRS = 32
"""Preference pairs per optimizer step of SFT: its default."""


SFT_SAVES = ("checkpoint_offload", "tile_tokens")
"""Settings that joint SFT may need where PPO does not: its pair is two rows at once."""
PPO_ALONE = (
    "minibatch",
    "score_batch",
    "update_order",
    "offload_in_rollout",
    "kv_cache",
    "rollout_weights",
    "advantage",
    "ema",
    "ptx",
)
"""Fields of a workload that joint SFT has nothing of."""
EMA_DECAY = 0.992
"""A running mean over the last 125 optimizer steps or so."""
ROLLOUT = 64
"""Responses per PPO step, however few are decoded together: the default."""


@dataclass(frozen=True)
class Recipe:
    """Settings with which joint SFT and PPO on a model fit a card.

    Attributes:
        plan: of PPO.
        sft: one step of joint SFT on the same base; its micro-batch counts pairs.
        sft_peak_bytes: predicted.
        usable_bytes: of the card.
    """

    plan: Plan
    sft: Workload
    sft_peak_bytes: int
    usable_bytes: int

    @property
    def sft_fits(self) -> bool:
        """Whether one pair at a time fits."""
        return self.sft_peak_bytes <= self.usable_bytes

    def shared_settings(self) -> dict[str, Any]:
        """Return `model` and `data` of both trainings; `data.train` is to be filled in."""
        return {"model": model_settings(self.plan.workload), "data": self.data_settings()}

    def data_settings(self) -> dict[str, Any]:
        """Return `data` of both trainings."""
        workload = self.plan.workload
        return {
            "train": "pairs.jsonl",
            "max_prompt_tokens": workload.prompt,
            "max_response_tokens": workload.response,
        }

    def sft_settings(self) -> dict[str, Any]:
        """Return what is of SFT alone."""
        given = {"batch_size": PAIRS, "microbatch_size": self.sft.microbatch, "optimizer": {"name": self.sft.optimizer}}
        ppo = self.plan.workload
        own = {name: value for name, value in asdict(self.sft).items() if name in SFT_SAVES and value != getattr(ppo, name)}
        heads = {"reward_heads": self.sft.reward_heads} if self.sft.reward_heads > 1 else {}
        return given | heads | ({"model": own} if own else {})

    def lines(self) -> list[str]:
        """Say what was predicted, in sentences."""
        phases = self.plan.phases
        tightest = max(phases, key=lambda phase: phases[phase])
        said = [
            f"Simulated, prompts of {self.sft.prompt} and answers of {self.sft.response} tokens: PPO peaks at "
            f"{format_bytes(self.plan.peak_bytes)} in {tightest}, joint SFT at {format_bytes(self.sft_peak_bytes)}; "
            f"{format_bytes(self.usable_bytes)} of the card are usable."
        ]
        if not self.sft_fits:
            said.append("Joint SFT does not fit at these lengths, one pair at a time: shorten data.max_response_tokens for it.")
        costs = [f"{saving.name} ({saving.exactness})" for saving in self.plan.savings]
        return said + ([f"What saves memory, and what it costs: {'; '.join(costs)}."] if costs else [])


def make_recipe(found: Search) -> Recipe | None:
    """Return the settings of both trainings after a search; None where nothing fits.

    The first plan, which costs least, that joint SFT fits on too; where it fits on none, the first. Each try of joint SFT is a
    simulation.
    """
    first: Recipe | None = None
    for plan in found.plans:
        for workload in _sft_tries(plan.workload):
            profile = capture(workload, "lora", simulate=True, stage="sft", timeline=False)
            peak = max(phase.bytes for phase in profile.phases.values())
            recipe = Recipe(plan, workload, peak, found.usable_bytes)
            if recipe.sft_fits:
                return recipe
        first = first or recipe
    return first


def _sft_tries(ppo: Workload) -> Iterator[Workload]:
    """Yield what may fit, the best first: fewer pairs at once, then what costs speed alone."""
    whole = sft_workload(ppo)
    micro = whole.microbatch
    while micro >= 1:
        yield replace(whole, microbatch=micro, rollout_batch=micro)
        micro //= 2
    single = replace(whole, microbatch=1, rollout_batch=1)
    if single.checkpointing and not single.checkpoint_offload:
        single = replace(single, checkpoint_offload=True)
        yield single
    if single.tile_tokens is None:
        yield replace(single, tile_tokens=TILE_TOKENS)


def sft_workload(ppo: Workload) -> Workload:
    """Return one step of joint SFT on the base as PPO holds it, of pairs of as many rows as PPO's micro-batch."""
    micro = max(1, ppo.microbatch // 2)
    of_ppo_alone = {name: getattr(Workload, name) for name in PPO_ALONE}
    return replace(ppo, rollout_batch=micro, microbatch=micro, **of_ppo_alone)


def model_settings(workload: Workload) -> dict[str, Any]:
    """Return `model`."""
    return {
        "name_or_path": HUB_NAMES.get(workload.model.lower(), workload.model),
        "quantization": workload.quantization,
        "quantize_embeddings": workload.quantize_embeddings,
        "dtype": workload.dtype,
        "trunk_layers": workload.trunk_layers,
        "gradient_checkpointing": workload.checkpointing,
        "checkpoint_offload": workload.checkpoint_offload,
        "tile_tokens": workload.tile_tokens,
        "shard_base": workload.shard_base,
        "lora": {"r": workload.rank, "alpha": 2 * workload.rank},
    }


def ppo_settings(workload: Workload) -> dict[str, Any]:
    """Return what is of PPO alone."""
    rows = workload.rollout_batch
    # Peaks are those of the rows decoded together; a cached trunk alone grows with the whole rollout.
    few = rows < ROLLOUT * workload.world and not workload.trunk_layers
    batch = ROLLOUT * workload.world if few else rows
    return {
        "rollout": {
            "batch_size": batch,
            "generation_batch_size": rows if few else None,
            "max_new_tokens": workload.response,
            "score_batch_size": workload.score_batch,
            "kv_cache": workload.kv_cache,
            **({"samples_per_prompt": 4} if workload.advantage in ("group", "rloo") else {}),
        },
        "optimizer": {"name": workload.optimizer, "offload_in_rollout": workload.offload_in_rollout},
        **({"update_order": workload.update_order} if workload.advantage == "gae" else {"advantage": workload.advantage}),
        "minibatch_size": min(batch, -(-16 // workload.world) * workload.world),
        "microbatch_size": workload.microbatch,
        **({"ema_decay": EMA_DECAY} if workload.ema else {}),
        **({"ptx": {"data": "pairs.jsonl"}} if workload.ptx else {}),
    }
