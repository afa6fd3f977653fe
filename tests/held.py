"""All that a loaded base is held in, by name: weights, buffers, statistics of quantised layers, and what they compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("absmax", "code", "offset", "CB", "SCB", "dtype", "blocksize", "quant_type", "shape", "nested")


def held(model: nn.Module) -> dict[str, Any]:
    """Return it."""
    found: dict[str, Any] = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        found[name] = type(module)
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        places = {"weight": weight, "state": state, "state2": getattr(state, "state2", None)}
        for place, holder in (places | {"layer": getattr(module, "state", None)}).items():
            for part in PARTS:
                value = getattr(holder, part, None)
                if value is not None:
                    found[f"{name}.{place}.{part}"] = value
        if hasattr(module, "compute_dtype"):
            found[f"{name}.compute_dtype"] = module.compute_dtype
    return found


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of what two models hold otherwise, to the last bit."""
    left, right = held(one), held(other)
    return sorted(left.keys() ^ right.keys()) + [
        name for name in left.keys() & right.keys() if not _same(left[name], right[name])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
