"""What a plan makes of a model and a card: the settings of both trainings, and what they peak at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra_ppo.profiling.cli.plan import Plan, Search
from hydra_ppo.profiling.measuring.capture import WARM_UP, capture
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES
from hydra_ppo.profiling.workload import Workload

PAIRS = 32
"""Preference pairs per optimizer step of SFT: its default."""


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
        return {"batch_size": PAIRS, "microbatch_size": self.sft.microbatch, "optimizer": {"name": self.sft.optimizer}}

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


def make_recipe(found: Search, simulate_config: Any = None) -> Recipe | None:
    """Return the settings of both trainings after a search; None where nothing fits.

    Args:
        found: the search; its first plan, which costs least, is taken.
        simulate_config: Hugging Face config, where it is not that of the model's name.

    The micro-batch of SFT is the largest, in powers of two, of as many rows as PPO's that fits; each try is a simulation.
    """
    if not found.plans:
        return None
    plan = found.plans[0]
    workload = sft_workload(plan.workload)
    while True:
        sizes = workload, "lora"
        profile = capture(*sizes, simulate=True, stage="sft", config=simulate_config, timeline=False)
        peak = max(phase.bytes for name, phase in profile.phases.items() if name != WARM_UP)
        if peak <= found.usable_bytes or workload.microbatch == 1:
            return Recipe(plan, workload, peak, found.usable_bytes)
        micro = workload.microbatch // 2
        workload = sft_workload(plan.workload, micro)


def sft_workload(ppo: Workload, microbatch: int | None = None) -> Workload:
    """Return one step of joint SFT on the base as PPO holds it; pairs of as many rows as PPO's micro-batch where not told."""
    micro = microbatch or max(1, ppo.microbatch // 2)
    return Workload(
        model=ppo.model,
        quantization=ppo.quantization,
        dtype=ppo.dtype,
        rank=ppo.rank,
        prompt=ppo.prompt,
        response=ppo.response,
        rollout_batch=micro,
        microbatch=micro,
        trunk_layers=ppo.trunk_layers,
        checkpointing=ppo.checkpointing,
        quantize_embeddings=ppo.quantize_embeddings,
        optimizer=ppo.optimizer,
        checkpoint_offload=ppo.checkpoint_offload,
        tile_tokens=ppo.tile_tokens,
    )


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
    return {
        "rollout": {
            "batch_size": workload.rollout_batch,
            "max_new_tokens": workload.response,
            "score_batch_size": workload.score_batch,
            "kv_cache": workload.kv_cache,
            **({"samples_per_prompt": 4} if workload.advantage in ("group", "rloo") else {}),
        },
        "optimizer": {"name": workload.optimizer, "offload_in_rollout": workload.offload_in_rollout},
        **({"update_order": workload.update_order} if workload.advantage == "gae" else {"advantage": workload.advantage}),
        "minibatch_size": min(workload.rollout_batch, -(-16 // workload.world) * workload.world),
        "microbatch_size": workload.microbatch,
    }
