"""AdamW in each of the ways that its moments can be kept, its schedule, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from hydra_ppo.config.settings import OptimizerSettings
from hydra_ppo.errors import NonFiniteError
from hydra_ppo.training import eight_bit
from hydra_ppo.training.offloaded import OffloadedAdamW, check_state


@runtime_checkable
class Adopts(Protocol):
    """An optimizer that takes over a saved state itself, since not all of it lives where the parameter does."""

    def adopt(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy the state of a parameter from what `save_optimizer` kept."""


def build_optimizer(
    groups: Iterable[tuple[Mapping[str, nn.Parameter], float]],
    settings: OptimizerSettings,
    total_steps: int,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Build AdamW over named parameters, and its schedule.

    Args:
        groups: (parameters by name, peak learning rate) of each role. A parameter that occurs twice counts once.
        settings: of AdamW and the schedule.
        total_steps: optimizer steps until the learning rate has run down.

    Raises:
        ConfigError: `settings.name` cannot be had on this device or with these versions.

    Memory: from the first step on two numbers per parameter, of its type, on the device (adamw) or the host
    (adamw-offloaded); of the 8-bit kinds two bytes and a little, see `eight_bit`.
    """
    seen: set[int] = set()
    listed: list[dict[str, Any]] = []
    for parameters, rate in groups:
        new = [p for p in parameters.values() if id(p) not in seen]
        seen |= {id(p) for p in new}
        listed.append({"params": new, "lr": rate})
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.name == "adamw-offloaded":
        optimizer = OffloadedAdamW(listed, **shared)
    elif settings.name in eight_bit.NAMES:
        device = next((p.device.type for group in listed for p in group["params"]), None)
        eight_bit.check_available(settings.name, device)
        optimizer = eight_bit.build(settings.name, listed, **shared)
    else:
        optimizer = torch.optim.AdamW(listed, fused=True, **shared)
    return optimizer, build_schedule(optimizer, settings, total_steps)


def build_schedule(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, total_steps: int) -> LRScheduler:
    """Build the schedule of an optimizer's learning rates over `total_steps` optimizer steps."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup_fraction * total_steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to `max_norm` (None: leave them) and return the norm () that they had."""
    return nn.utils.clip_grad_norm_(list(parameters), float("inf") if max_norm is None else max_norm)


def check_finite(optimizer: torch.optim.Optimizer, names: Mapping[int, str], where: str) -> None:
    """Refuse to save parameters that are NaN or infinite.

    Args:
        names: of the parameters, by id.
        where: step and phase, for the message.

    Raises:
        NonFiniteError: naming the first such parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters]).tolist()
    for parameter, fine in zip(parameters, finite, strict=True):
        if not fine:
            raise NonFiniteError(
                f"{where}: {names[id(parameter)]} is not finite; it is not saved. Lower optimizer.learning_rate, and "
                "start from the checkpoint before."
            )


def fresh_scaler(scaler: torch.amp.GradScaler, device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler of the same state that has not yet unscaled anything, after a step that failed half way."""
    fresh = torch.amp.GradScaler(device.type, enabled=scaler.is_enabled())
    fresh.load_state_dict(scaler.state_dict())
    return fresh


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors that the optimizer keeps, wherever they are, each once."""
    found = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return list({id(value): value for value in found}.values())


def save_optimizer(
    optimizer: torch.optim.Optimizer, schedule: LRScheduler, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an optimizer and its schedule have come to: tensors, and what JSON can hold.

    Args:
        names: of the parameters, by id.
    """
    tensors = {
        f"{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in eight_bit.saved_entries(state).items()
    }
    return tensors, {"done": schedule.last_epoch, "rates": schedule.get_last_lr()}


@torch.no_grad()
def load_optimizer(
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Bring a fresh optimizer and schedule to what `save_optimizer` returned.

    Raises:
        ValueError: where moments are of another shape than their parameter, or those of another optimizer.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        states.setdefault(name, {})[kind] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if found := states.get(names[id(parameter)]):  # a parameter that never had a gradient has no state
                try:
                    _adopt(optimizer, parameter, found)
                except ValueError as error:
                    raise ValueError(f"{names[id(parameter)]}.{error}") from None
    for group, rate in zip(optimizer.param_groups, values["rates"], strict=True):
        group["lr"] = rate
    schedule.last_epoch = values["done"]
    schedule._step_count = values["done"] + 1
    schedule._last_lr = list(values["rates"])


def _adopt(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
    if isinstance(optimizer, Adopts):
        optimizer.adopt(parameter, state)
        return
    check_state(parameter, state)
    optimizer.state[parameter] = {kind: value.to(parameter.device, copy=True) for kind, value in state.items()}


def rates_until(settings: OptimizerSettings, total_steps: int, done: int) -> list[float]:
    """Return the factors of the learning rate in the first `done` steps of a run of `total_steps`."""
    schedule = build_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0), settings, total_steps)
    assert isinstance(schedule, LambdaLR)  # as all of transformers' schedules named in the settings are
    (factor,) = schedule.lr_lambdas
    return [factor(step) for step in range(done)]
