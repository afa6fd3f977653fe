"""LoRA adapters: their shape, putting them on a base, and switching them without touching `requires_grad` or a weight."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hydra_ppo.compat import experts_of, refused_targets
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError, RoleError, UnsupportedModelError
from hydra_ppo.model.adapter_options import check_options, new_config, saved_options
from hydra_ppo.model.architecture import Architecture

logger = logging.getLogger("hydra_ppo")


class AdapterSwitch:
    """Says which one adapter of a base is active, or none.

    PEFT's own `set_adapter` also makes the chosen adapter trainable and all others not. A backward pass after such a
    switch finds frozen parameters and leaves them without a gradient, with no error. This switch sets the two attributes
    that PEFT's layers read in their forward pass, and nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.active: str | None = None
        self.set(None)

    def set(self, adapter: str | None) -> None:
        """Make `adapter` the active one; None switches all of them off.

        Raises:
            RoleError: when one is merged into the base.
        """
        for layer in self._layers:
            if layer.merged_adapters:
                raise RoleError(
                    f"adapter {layer.merged_adapters[0]!r} is merged into the base, which all roles share; unmerge it "
                    "(unmerge_adapter), or merge what export writes."
                )
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self.active = adapter

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Activate `adapter` inside the block and restore what was there, also after an exception."""
        before = self.active
        self.set(adapter)
        try:
            yield
        finally:
            self.set(before)


def refuse_adapters(causal_lm: nn.Module) -> None:
    """Refuse a base that carries adapters already: they would be on in every role, the reference too.

    Raises:
        ConfigError: saying what to hand over instead.
    """
    if isinstance(causal_lm, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in causal_lm.modules()):
        raise ConfigError(
            f"base={type(causal_lm).__name__} carries adapters already, which no role could switch off; hand over the plain "
            "model (get_base_model().unload(), or merge_and_unload()), and name an adapter of your own with model.adapter."
        )


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter by name, the adapter's own name replaced by `{}`."""
    marker = f".{adapter}."
    return {
        name.replace(marker, ".{}."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name and marker in name
    }


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Make `target` an exact copy of `source`; where its rank is larger, what is added contributes nothing as yet.

    Raises:
        ConfigError: when their shapes differ otherwise.
    """
    origin, copy = adapter_parameters(model, source), adapter_parameters(model, target)
    ranks = {name: 1 if "lora_B" in name else 0 for name in copy}  # B is (out, r), A is (r, in)
    if origin.keys() != copy.keys() or any(not _holds(v.shape, origin[k].shape, ranks[k]) for k, v in copy.items()):
        raise ConfigError(
            f"lora shape of adapter {target!r} differs from that of {source!r}, which it starts as a copy of; "
            "use the same rank and target modules."
        )
    for name, parameter in copy.items():
        if parameter.shape == origin[name].shape:
            parameter.copy_(origin[name])
            continue
        axis, rank = ranks[name], origin[name].shape[ranks[name]]
        parameter.narrow(axis, 0, rank).copy_(origin[name])
        if axis == 1:  # the added rows of A stay as they were drawn, and B keeps them out
            parameter.narrow(axis, rank, parameter.shape[axis] - rank).zero_()


def _holds(larger: torch.Size, smaller: torch.Size, axis: int) -> bool:
    """Say whether two shapes are equal, or the first is larger along one axis of two."""
    if larger == smaller:
        return True
    return len(larger) == len(smaller) == 2 and larger[1 - axis] == smaller[1 - axis] and larger[axis] > smaller[axis]


def lora_config(architecture: Architecture, lora: LoraConfig | LoraSettings | None, trunk_layers: int) -> LoraConfig:
    """Return the PEFT config of new adapters: target modules spelled out, the trunk left out, all else as given.

    Raises:
        ConfigError: for what a base shared by four roles cannot take.
    """
    if isinstance(lora, LoraConfig):
        config = deepcopy(lora)
    else:
        lora = lora or LoraSettings()
        options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
        if lora.target_parameters:  # which older versions of PEFT do not know
            options["target_parameters"] = list(lora.target_parameters)
        config = new_config(target_modules=lora.target_modules, **options)
    check_options(config, "lora.")
    experts = _experts(architecture, getattr(config, "target_parameters", None) or (), trunk_layers)
    if experts:
        config.target_parameters = None  # until PEFT was asked what it makes of the modules
    names = isinstance(asked := config.target_modules, str | type(None)) and asked in (None, "all-linear")
    targets, by_name = _targets(architecture, asked, trunk_layers)
    causal_lm = architecture.causal_lm
    for refused, why in (
        (experts_of(causal_lm, config, targets), "fused experts, whose parameters an adapter would have to be put on"),
        (refused_targets(config, causal_lm, targets), "read by a kernel that an adapter would be left out of"),
    ):
        if not refused:
            continue
        if not names:
            raise ConfigError(f"lora.target_modules={sorted(refused)} are {why}; leave them out.")
        targets -= refused
        logger.info("adapters sit on %s and not on %s: %s", *(_few(found) for found in (targets, refused)), why)
    if not targets:
        raise UnsupportedModelError(
            f"model={type(causal_lm).__name__} has no linear layer that an adapter could sit on; use another model."
        )
    offered = _short(architecture.expert_paths())
    if experts:
        config.target_parameters = experts
    elif offered and names:
        logger.info(
            "adapters sit on %s; the experts are no linear layers here, and have none: lora.target_parameters puts adapters on "
            "them too (%s)",
            *(_few(targets), ", ".join(offered)),
        )
    config.target_modules = targets  # type: ignore[assignment]  # PEFT says list, and makes a set of one itself
    config.fan_in_fan_out = architecture.config.model_type == "gpt2"
    config.task_type = "CAUSAL_LM"
    if trunk_layers and by_name:
        config.layers_to_transform = list(range(trunk_layers, len(architecture.layers)))
        config.layers_pattern = architecture.layers_name
    return config


def _targets(architecture: Architecture, asked: Any, trunk_layers: int) -> tuple[set[str], bool]:
    """Return what PEFT is to adapt, and whether it is said by last names alone; else by full names, the trunk left out.

    Args:
        asked: as PEFT takes it: names or ends of names, one regular expression for whole names, "all-linear", or None.

    Raises:
        ConfigError: where there are no such linear layers inside the decoder layers.
    """
    available = architecture.linear_names()
    if asked is None or asked == "all-linear":
        asked = available
    elif isinstance(asked, str) and asked in available:
        asked = [asked]
    inside = list(architecture.linear_paths())
    if isinstance(asked, str):
        found = {path for path in inside if _matches(asked, path)}
        unknown = [] if found else [asked]
    else:
        found = {path for path in inside if any(path == name or path.endswith(f".{name}") for name in asked)}
        unknown = sorted(name for name in asked if not any(path == name or path.endswith(f".{name}") for path in inside))
    if unknown:
        raise ConfigError(
            f"lora.target_modules={unknown} are not linear layers of this model; choose among {', '.join(available)}."
        )
    # Others may have the same names: layers of a tower for images, experts that are no linear layers, layer 0 itself.
    ours = set(inside)
    elsewhere = {name.rsplit(".", 1)[-1] for name, _ in architecture.causal_lm.named_modules() if name not in ours}
    if not isinstance(asked, str) and set(asked) <= set(available) - elsewhere:
        return set(asked), True
    return found & set(architecture.linear_paths(trunk_layers)), False


def _experts(architecture: Architecture, asked: Iterable[str], trunk_layers: int) -> list[str]:
    """Return the full names of the experts' parameters that are asked for by the ends of their names, the trunk left out.

    Raises:
        ConfigError: where there are no such parameters.
    """
    everywhere = list(architecture.expert_paths())
    for name in asked:
        if not any(path == name or path.endswith(f".{name}") for path in everywhere):
            known = _short(everywhere)
            remedy = f"choose among {', '.join(known)}" if known else "this model has none, leave it out"
            raise ConfigError(f"lora.target_parameters={name!r} is no parameter of experts; {remedy}.")
    ends = tuple(asked)
    return [path for path in architecture.expert_paths(trunk_layers) if any(path == n or path.endswith(f".{n}") for n in ends)]


def _short(paths: Iterable[str]) -> list[str]:
    """Return the last three parts of full names, each once: what says a parameter of experts in any layer."""
    return sorted({".".join(path.split(".")[-3:]) for path in paths})


def _few(names: Iterable[str]) -> str:
    """Return the last parts of names, each once."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules={pattern!r} is neither a layer's name nor a regular expression ({error}); use names."
        ) from error


def put_adapter(base: PreTrainedModel | PeftModel, name: str, shape: LoraConfig, folder: Path | None) -> PeftModel:
    """Put adapter `name` on the base: read from `folder`, or new and of `shape` where that is None.

    Raises:
        ConfigError: when the folder has no safetensors, or does not fit the base.
    """
    config = deepcopy(shape) if folder is None else saved_options(folder)
    config.inference_mode = False
    try:
        if isinstance(base, PeftModel):
            base.add_adapter(name, config)
        else:
            base = PeftModel(base, config, adapter_name=name)
    except ValueError as error:  # no such layers
        raise ConfigError(f"adapter {str(folder or name)!r} does not fit this base ({error}); use its own base.") from error
    # In bf16 a small step of the optimizer rounds to nothing. PEFT 0.18 casts the first adapter only.
    for parameter in adapter_parameters(base, name).values():
        parameter.data = parameter.data.float()
    if folder is not None:
        read_adapter(base, name, folder)
    return base


def check_trunk_is_free(layers: nn.ModuleList, trunk_layers: int) -> None:
    """Refuse adapters on layers that are to be the same in every role.

    Raises:
        ConfigError: naming the setting.
    """
    if any(isinstance(module, BaseTunerLayer) for layer in list(layers)[:trunk_layers] for module in layer.modules()):
        raise ConfigError(
            f"model.trunk_layers={trunk_layers}: the adapter of model.adapter sits on those layers too, which would then "
            "differ by role; use 0, or an adapter that was trained on the layers above."
        )


def read_adapter(base: PeftModel, name: str, folder: Path) -> None:
    """Copy the saved weights of adapter `name` into it: all of them, and no others.

    Raises:
        ConfigError: when the folder has no safetensors, lacks tensors, or does not fit the base.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"adapter {str(folder)!r} lacks adapter_model.safetensors; save it again, as safetensors.")
    state = load_file(weights)
    check_fit(base, name, folder, {key: tuple(tensor.shape) for key, tensor in state.items()})
    # By name and not by PEFT's own function, which renames what it takes for experts of older versions, and loses some.
    with torch.no_grad():
        for key, parameter in adapter_parameters(base, name).items():
            parameter.copy_(state[key.replace(".{}.", ".")])


def check_fit(base: PeftModel, name: str, folder: Path, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those of adapter `name`: what is missing would stay fresh, what is foreign unread.

    Args:
        base: with the adapter on it, as its config says; on the meta device it does too.
        name: of the adapter.
        folder: that holds it.
        found: shapes of the tensors in its file, by name.

    Raises:
        ConfigError: naming the first, and how many.
    """
    state = get_peft_model_state_dict(base, adapter_name=name, save_embedding_layers=False)
    needed = {key: tuple(tensor.shape) for key, tensor in state.items()}
    what = f"adapter {str(folder)!r}"
    if strangers := sorted(found.keys() - needed.keys()):
        raise ConfigError(
            f"{what} does not fit this base ({_first_of(strangers)} of no layer that it adapts); load it on the base that it "
            "was trained on."
        )
    if missing := sorted(needed.keys() - found.keys()):
        raise ConfigError(
            f"{what} lacks {_first_of(missing)} that its adapter_config.json promises on this base, and none is made up; save "
            "the adapter again."
        )
    if wrong := sorted(key for key in needed if needed[key] != found[key]):
        key = wrong[0]
        raise ConfigError(
            f"{what} does not fit this base ({key} is {list(found[key])}, not {list(needed[key])}); load it on the base that "
            "it was trained on, with its own adapter_config.json."
        )


def _first_of(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {names[0]} the first,"
