"""The one HydraModel of a process of verl, which the engines of actor, reference and critic share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import nn

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.manifest import MANIFEST, base_folder
from hydra_ppo.patches.verl_rules import Settings, check_shared
from hydra_ppo.patches.versions import HostError

logger = logging.getLogger("hydra_ppo")


class Shared:
    """The base of a process and what was asked of it."""

    def __init__(self, model: HydraModel, settings: Settings) -> None:
        self.model, self.settings = model, settings


_shared: WeakValueDictionary[str, Shared] = WeakValueDictionary()
"""At most one; it goes when the last engine that stands on it does."""


def build(settings: Settings, device: torch.device) -> Shared:
    """Load the base and put the adapters of actor and critic on it, the same on every rank.

    Raises:
        HostError: where this process has a base already, or the adapters that training starts from are not as verl was told.

    Memory: the base once; per adapter set 4 bytes a LoRA parameter.
    """
    if "base" in _shared:
        raise HostError("actor_rollout_ref.actor.strategy=hydra was asked for twice in one process, which has one base.")
    extra = settings.extra
    options: dict[str, Any] = {
        "quantization": extra.quantization,
        "quantize_embeddings": extra.quantize_embeddings,
        "trunk_layers": extra.trunk_layers,
        "tile_tokens": extra.tile_tokens,
        "attention": settings.attention,
        "dtype": settings.dtype,
        "packing": settings.packing,
        "device": str(device),
        "trust_remote_code": settings.trust_remote_code,
    }
    start = None if settings.adapter is None else Path(settings.adapter)
    if start is not None and (start / MANIFEST).is_file():
        _check_base(start, settings)
        model = HydraModel.from_pretrained(start, **options)
    else:
        options["lora"] = _lora(settings)
        model = HydraModel.from_pretrained(settings.path, adapter=start, **options)
    config = cast(LoraConfig, model.base.peft_config["actor"])
    if start is not None and config.r != settings.rank:
        raise HostError(
            f"actor_rollout_ref.model.lora_rank={settings.rank} is not the rank of the adapter in {settings.adapter!r}, for "
            f"which vLLM must make room; set {config.r}."
        )
    if settings.checkpointing:
        model.enable_checkpointing(offload=settings.checkpoint_offload)
    logger.info("engine hydra: actor, reference and critic stand on one base, %s", settings.path)
    same_everywhere(model)
    return _shared.setdefault("base", Shared(model, settings))


def join(role: str, settings: Settings) -> Shared:
    """Return the base that the actor's engine has built in this process, for another role.

    Raises:
        HostError: where there is none, or it is not the one that `settings` ask for.
    """
    shared = _shared.get("base")
    if shared is None:
        raise HostError(
            f"{role}: strategy=hydra finds no actor in this process, on whose base it is to run; set "
            "actor_rollout_ref.actor.strategy=hydra, and leave actor and critic in one resource pool."
        )
    check_shared(role, settings, shared.settings)
    return shared


def same_everywhere(model: HydraModel) -> None:
    """Give every rank the adapters and heads that rank 0 has drawn."""
    if dist.get_world_size() > 1:
        for role in model.trainable_roles:
            for parameter in model.role_parameters(role).values():
                dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over ranks, in one sum; one that is missing everywhere stays so, one missing here counts as zero.

    verl's losses are scaled for an average over ranks.

    Memory: the gradients once more, while they are sent.
    """
    world = dist.get_world_size()
    if world == 1:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([there, *(gradient.reshape(-1) for gradient in gradients)])
    dist.all_reduce(flat)
    found, at = flat[: len(parameters)].tolist(), len(parameters)
    for parameter, gradient, count in zip(parameters, gradients, found, strict=True):
        if count:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient)).div_(world)
            parameter.grad = gradient
        at += gradient.numel()


def _lora(settings: Settings) -> LoraSettings:
    targets = settings.target_modules or "all-linear"
    return LoraSettings(settings.rank, settings.alpha, targets, list(settings.target_parameters))


def _check_base(folder: Path, settings: Settings) -> None:
    base = base_folder(folder)
    given = settings.path
    if given != base and not (Path(given).is_dir() and Path(base).is_dir() and Path(given).samefile(base)):
        raise HostError(
            f"actor_rollout_ref.model.path={given!r} is not {base!r}, the base that lora_adapter_path={str(folder)!r} was "
            "trained on; name that one."
        )
