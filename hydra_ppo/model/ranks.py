"""Ranks of actor and critic that differ from that of the adapter which they start as copies of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

from peft import LoraConfig, PeftModel

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError


def own_ranks(lora: LoraConfig | LoraSettings | None) -> Mapping[str, int]:
    """Return the ranks that are set for one adapter alone, by its name; a running mean of the actor is as the actor."""
    if not isinstance(lora, LoraSettings):
        return {}
    ranks = {"actor": lora.actor_rank, "actor_ema": lora.actor_rank, "critic": lora.critic_rank}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def sized(shape: LoraConfig, rank: int | None, source: str | None) -> LoraConfig:
    """Return a shape with another rank at the same scale, so that a copy with zeros added says the same.

    Args:
        shape: of what the adapter starts from, or of new adapters.
        rank: None leaves it.
        source: what the adapter starts from; None is nothing.

    Raises:
        ConfigError: where the rank is below that of the source, or the shape has ranks by layer.
    """
    if rank is None or rank == shape.r:
        return shape
    if shape.rank_pattern or shape.alpha_pattern or getattr(shape, "target_parameters", None):
        raise ConfigError(
            f"model.lora rank={rank} for one role does not go with ranks by layer or fused experts; leave it out."
        )
    if source is not None and rank < shape.r:
        raise ConfigError(
            f"model.lora rank={rank} is below the {shape.r} of adapter {source!r}, of which it is to start as an exact copy; "
            f"choose {shape.r} or more, or start from a base without an adapter (sft with method='full')."
        )
    found = deepcopy(shape)
    grown = rank / shape.r
    found.r, found.lora_alpha = rank, shape.lora_alpha * (math.sqrt(grown) if shape.use_rslora else grown)  # type: ignore[assignment]
    if found.lora_alpha == int(found.lora_alpha):
        found.lora_alpha = int(found.lora_alpha)
    return found


def check_rank(base: PeftModel, name: str, rank: int | None) -> None:
    """Refuse a saved adapter of another rank than is asked for.

    Raises:
        ConfigError: naming both.
    """
    found = base.peft_config[name].r  # type: ignore[attr-defined]
    if rank is not None and found != rank:
        raise ConfigError(f"model.lora rank={rank} is asked for {name!r}, and the saved one has {found}; leave it out.")
