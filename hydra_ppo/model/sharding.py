"""Shares the decoder layers of a frozen base out over processes: each holds a part of every layer, and gathers one at a time.

What is trained, the heads, embeddings and the output head stay whole everywhere, so gradients, optimizer and saving are as
without it. FSDP2 does the gathering (torch.distributed.fsdp.fully_shard, Zhao et al. 2023, arXiv 2304.11277); it reduces
nothing, since a layer has no parameter of it that is trained.

Every process must run the same passes in the same order: whoever left one out would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor, nn

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.architecture import inspect_architecture

KEPT = ("quant_type", "compress_statistics", "blocksize", "quant_storage", "bnb_quantized", "_is_hf_initialized")
"""What others read of a weight, which the part of it that stays does not have by itself."""


def check_shardable(quantization: str | None, tunes_base: bool) -> None:
    """Refuse a base that cannot be shared out, before a weight is read.

    Args:
        quantization: of its linear layers.
        tunes_base: whether it is itself trained.

    Raises:
        ConfigError: naming the setting.
    """
    if quantization == "int8":
        raise ConfigError(
            "model.shard_base=true cannot share out model.quantization='int8': bitsandbytes keeps scales on the weight, which "
            "is not there between passes; use nf4 or null."
        )
    if tunes_base:
        raise ConfigError("model.shard_base=true shares out a frozen base, and this run trains it; use method='lora'.")
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "model.shard_base=true shares the base out over several processes, and this one is alone; start them with "
            "torchrun, or leave it false."
        )


def shard_layer(layer: nn.Module) -> None:
    """Keep this process's part of a decoder layer, and gather the rest for each of its passes.

    Memory: a part of its weights for good, all of one layer while it runs; scales of 4-bit weights stay whole.
    """
    from torch.distributed.fsdp import fully_shard

    kept = {name: _attributes(parameter) for name, parameter in layer.named_parameters()}
    for module in layer.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state = state  # which bitsandbytes looks for where the weight has none
    mesh = all_processes(next(layer.parameters()).device.type, dist.group.WORLD)
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for name, parameter in layer.named_parameters():
        for attribute, value in kept[name].items():
            setattr(parameter, attribute, value)


@cache
def all_processes(device: str, group: Any) -> Any:
    """Return the mesh of all processes of a group, one line of them."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (dist.get_world_size(group),))


def _attributes(parameter: Tensor) -> dict[str, Any]:
    return {name: getattr(parameter, name) for name in KEPT if hasattr(parameter, name)}


def shard_layers(model: nn.Module) -> None:
    """Share out the decoder layers of a base that are whole still, one after the other."""
    for layer in inspect_architecture(model).layers:  # type: ignore[arg-type]
        if not is_sharded(layer):
            shard_layer(layer)


def is_sharded(module: nn.Module) -> bool:
    """Say whether a layer, or a layer of a model, is shared out."""
    return any(local_part(parameter) is not parameter for parameter in module.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a parameter that is in this process; the parameter itself where it is not shared out."""
    return getattr(tensor, "_local_tensor", tensor)


def bytes_here(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of parameters that are in this process."""
    return sum(part.numel() * part.element_size() for part in map(local_part, tensors))


class Whole:
    """Tells, of weights that come one by one, when a decoder layer has all of its own, and shares it out then.

    So no process ever holds more of the base than its parts and one layer.
    """

    def __init__(self) -> None:
        self._missing: dict[str, set[str]] | None = None
        self._layers: dict[str, nn.Module] = {}

    def see(self, model: nn.Module, name: str) -> None:
        """Take in that a weight has come."""
        if self._missing is None:
            layers = {id(layer) for layer in inspect_architecture(model).layers}  # type: ignore[arg-type]
            self._layers = {path: module for path, module in model.named_modules() if id(module) in layers}
            self._missing = {
                path: {f"{path}.{weight}" for weight, _ in module.named_parameters()} for path, module in self._layers.items()
            }
        for path, missing in self._missing.items():
            if name in missing:
                missing.discard(name)
                if not missing:
                    shard_layer(self._layers[path])
                return


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """Let transformers read weights in order inside the block, not many ahead of those that are put in place, and take no room
    for all of them at once, as it does on a GPU to save allocations."""
    from transformers import modeling_utils

    with ExitStack() as stack:
        stack.enter_context(patch.dict("os.environ", HF_DEACTIVATE_ASYNC_LOAD="1"))
        if hasattr(modeling_utils, "caching_allocator_warmup"):
            stack.enter_context(patch.object(modeling_utils, "caching_allocator_warmup", lambda *args, **kwargs: None))
        yield
