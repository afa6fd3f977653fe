"""LoRA adapters: their shape, putting them on a base, and switching them without touching `requires_grad` or a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.architecture import Architecture

REFUSED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "lora_dropout": ((0.0,), "would add noise to the ratio of PPO", "set lora_dropout=0"),
    "modules_to_save": ((None, []), "would train a copy of base layers", "leave it out"),
    "bias": (("none",), "would train biases of the base that all roles share", "use bias='none'"),
    "init_lora_weights": (
        (True, "gaussian"),
        "changes the base that all roles share, or gives the actor a start other than the reference",
        "use True or 'gaussian'",
    ),
    "use_dora": ((False,), "rounds, so that the actor would not start as the reference to the last bit", "leave it out"),
    "layers_to_transform": ((None, []), "is what trunk_layers sets", "use trunk_layers"),
    "layer_replication": ((None, []), "would give each role a depth of its own", "leave it out"),
    "trainable_token_indices": ((None, []), "would train embeddings that all roles share", "leave it out"),
    "target_parameters": ((None, []), "is not supported", "use target_modules"),
}
"""PEFT options that a shared base cannot take: values that are fine, the rule that others break, what to do."""


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
        """Make `adapter` the active one; None switches all of them off."""
        for layer in self._layers:
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
    """Make `target` an exact copy of `source`.

    Raises:
        ConfigError: when their shapes differ.
    """
    origin, copy = adapter_parameters(model, source), adapter_parameters(model, target)
    if {k: v.shape for k, v in origin.items()} != {k: v.shape for k, v in copy.items()}:
        raise ConfigError(
            f"lora shape of adapter {target!r} differs from that of {source!r}, which it starts as a copy of; "
            "use the same rank and target modules."
        )
    for name, parameter in copy.items():
        parameter.copy_(origin[name])


def lora_config(architecture: Architecture, lora: LoraConfig | LoraSettings | None, trunk_layers: int) -> LoraConfig:
    """Return the PEFT config of new adapters: target modules spelled out, the trunk left out, all else as given.

    Raises:
        ConfigError: for what a base shared by four roles cannot take.
    """
    if isinstance(lora, LoraConfig):
        config = deepcopy(lora)
    else:
        lora = lora or LoraSettings()
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, use_rslora=lora.use_rslora)
    for name, (allowed, why, remedy) in REFUSED.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"lora.{name}={value!r} {why}; {remedy}.")
    available = architecture.linear_names()
    asked = config.target_modules
    if asked is None or asked == "all-linear":
        asked = available
    targets = {asked} if isinstance(asked, str) else set(asked)
    unknown = sorted(targets - set(available))
    if unknown:
        raise ConfigError(
            f"lora.target_modules={unknown} are not linear layers of this model; choose among {', '.join(available)}."
        )
    config.target_modules = targets  # type: ignore[assignment]  # PEFT says list, and makes a set of one itself
    config.fan_in_fan_out = architecture.config.model_type == "gpt2"
    config.task_type = "CAUSAL_LM"
    if trunk_layers:
        config.layers_to_transform = list(range(trunk_layers, len(architecture.layers)))
        config.layers_pattern = architecture.layers_name
    return config


def put_adapter(base: PreTrainedModel | PeftModel, name: str, shape: LoraConfig, folder: Path | None) -> PeftModel:
    """Put adapter `name` on the base: read from `folder`, or new and of `shape` where that is None.

    Raises:
        ConfigError: when the folder has no safetensors, or does not fit the base.
    """
    config = deepcopy(shape) if folder is None else PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if isinstance(base, PeftModel):
        base.add_adapter(name, config)
    else:
        base = PeftModel(base, config, adapter_name=name)
    # In bf16 a small step of the optimizer rounds to nothing. PEFT 0.18 casts the first adapter only.
    for parameter in adapter_parameters(base, name).values():
        parameter.data = parameter.data.float()
    if folder is not None:
        read_adapter(base, name, folder)
    return base


def read_adapter(base: PeftModel, name: str, folder: Path) -> None:
    """Copy the saved weights of adapter `name` into it: all of them, and no others.

    Raises:
        ConfigError: when the folder has no safetensors, lacks tensors, or does not fit the base.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError(
            f"model.name_or_path={str(folder.parent)!r} lacks {name}/adapter_model.safetensors; save the adapter again."
        )
    state = load_file(weights)
    check_fit(base, name, folder, {key: tuple(tensor.shape) for key, tensor in state.items()})
    set_peft_model_state_dict(base, state, adapter_name=name)


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
