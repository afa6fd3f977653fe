"""Switches LoRA adapters on a base without ever touching `requires_grad` or a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hydra_ppo.errors import ConfigError


class AdapterSwitch:
    """Says which one adapter of a base is active, or none.

    PEFT's own `set_adapter` also makes the chosen adapter trainable and all others not. A backward pass after such a
    switch finds frozen parameters and leaves them without a gradient, with no error. This switch sets the two attributes
    that PEFT's layers read in their forward pass, and nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

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


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, Tensor]:
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
