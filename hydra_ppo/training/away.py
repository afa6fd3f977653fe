"""Lets the state of an optimizer leave the device while it is not needed, and brings it back: copies, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydra_ppo.runtime.host_tensors import empty_on_host, is_on_host
from hydra_ppo.training.packed import Layout

TABLES = ("qmap1", "qmap2")
"""What 8-bit moments are read by: constant, one KiB each for all parameters together. It stays, and is not saved."""


def send_away(optimizer: torch.optim.Optimizer) -> None:
    """Move the state of every parameter to host memory; what is there already stays.

    A group of parameters has one run of bytes: on a GPU many small tensors would leave holes that nothing large fits into.

    Memory: on the host as much as leaves the device.
    """
    with torch.no_grad():
        for entries in _movable(optimizer, on_host=False):
            layout = Layout([state[kind] for state, kind in entries])
            device = entries[0][0][entries[0][1]].device
            # One byte, which looks like as many as are needed: only shape, type and device count.
            run = empty_on_host(torch.empty(1, dtype=torch.uint8, device=device).expand(layout.bytes))
            for (state, kind), place in zip(entries, layout.views(run), strict=True):
                place.copy_(state[kind], non_blocking=True)
                state[kind] = place  # what was there is not given to others before the copy is done: they wait in line
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # a checkpoint may be written from the host's memory next


def bring_back(optimizer: torch.optim.Optimizer) -> None:
    """Move to the device what `send_away` took from it, one run of bytes for each group of parameters."""
    with torch.no_grad():
        for entries in _movable(optimizer, on_host=True):
            layout = Layout([state[kind] for state, kind in entries])
            device = next(p.device for p in optimizer.param_groups[0]["params"])
            run = torch.empty(layout.bytes, dtype=torch.uint8, device=device)
            for (state, kind), place in zip(entries, layout.views(run), strict=True):
                place.copy_(state[kind], non_blocking=True)
                state[kind] = place
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # before the host's memory is let go of


def _movable(optimizer: torch.optim.Optimizer, on_host: bool) -> list[list[tuple[dict[str, Any], str]]]:
    """Return for each group that has any the places of tensors that are, or are not, in host memory: (state, kind)."""
    groups = []
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        groups.append(
            [
                (state, kind)
                for state in states
                for kind, value in state.items()
                if isinstance(value, Tensor) and kind not in TABLES and is_on_host(value) == on_host
            ]
        )
    return [entries for entries in groups if entries]
