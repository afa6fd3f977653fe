"""AdamW, its schedule, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from hydra_ppo.config import OptimizerSettings


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


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors that the optimizer keeps."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
