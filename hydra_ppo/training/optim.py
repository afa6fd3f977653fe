"""AdamW, its schedule, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from hydra_ppo.config.settings import OptimizerSettings
from hydra_ppo.errors import NonFiniteError


def build_optimizer(
    groups: Iterable[tuple[Mapping[str, nn.Parameter], float]], settings: OptimizerSettings, total_steps: int
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """Build AdamW over named parameters, and its schedule.

    Args:
        groups: (parameters by name, peak learning rate) of each role. A parameter that occurs twice counts once.
        settings: of AdamW and the schedule.
        total_steps: optimizer steps until the learning rate has run down.

    Memory: two fp32 numbers per parameter, from the first step on.
    """
    seen: set[int] = set()
    listed = []
    for parameters, rate in groups:
        new = [p for p in parameters.values() if id(p) not in seen]
        seen |= {id(p) for p in new}
        listed.append({"params": new, "lr": rate})
    optimizer = torch.optim.AdamW(
        listed,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup_fraction * total_steps)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


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
    """Return the tensors that the optimizer keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def save_optimizer(
    optimizer: torch.optim.Optimizer, schedule: LRScheduler, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an optimizer and its schedule have come to: tensors, and what JSON can hold.

    Args:
        names: of the parameters, by id.
    """
    tensors = {
        f"{names[id(parameter)]}.{key}": value for parameter, state in optimizer.state.items() for key, value in state.items()
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
        ValueError: where moments are of another shape than their parameter.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        states.setdefault(name, {})[kind] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if found := states.get(names[id(parameter)]):  # a parameter that never had a gradient has no state
                wrong = next((kind for kind, value in found.items() if value.ndim and value.shape != parameter.shape), None)
                if wrong is not None:
                    raise ValueError(
                        f"{names[id(parameter)]}.{wrong} is {list(found[wrong].shape)}, not {list(parameter.shape)}"
                    )
                optimizer.state[parameter] = {kind: value.to(parameter.device, copy=True) for kind, value in found.items()}
    for group, rate in zip(optimizer.param_groups, values["rates"], strict=True):
        group["lr"] = rate
    schedule.last_epoch = values["done"]
    schedule._step_count = values["done"] + 1
    schedule._last_lr = list(values["rates"])


def rates_until(settings: OptimizerSettings, total_steps: int, done: int) -> list[float]:
    """Return the factors of the learning rate in the first `done` steps of a run of `total_steps`."""
    _, schedule = build_optimizer([({"p": nn.Parameter(torch.zeros(()))}, 1.0)], settings, total_steps)
    assert isinstance(schedule, LambdaLR)  # as all of transformers' schedules named in the settings are
    (factor,) = schedule.lr_lambdas
    return [factor(step) for step in range(done)]
