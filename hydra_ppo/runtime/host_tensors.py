"""Tensors that are kept in the host's memory to spare the device, and how those who count know them.

A run on a CPU has one memory, and in a simulation every tensor says that it is on a CPU: what would be the host's beside a GPU
is known there by having been made here, and is not counted among what the device holds.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.runtime.announce import HOST, allocating

_STORAGES: weakref.WeakSet[Any] = weakref.WeakSet()


def empty_on_host(like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the shape and type of `like` in host memory, pinned where `like` is on a GPU.

    Memory: the host's alone.
    """
    pinned = like.device.type == "cuda"
    with allocating(HOST):  # not empty_like: those who count look at arguments too
        made = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
    _STORAGES.add(made.untyped_storage())
    return made


def to_host(tensor: Tensor, non_blocking: bool = False) -> Tensor:
    """Return a copy of `tensor` in host memory.

    Args:
        non_blocking: do not wait for the copy; who reads it on the host has to.
    """
    return empty_on_host(tensor).copy_(tensor.detach(), non_blocking=non_blocking)


def count_as_host(tensor: Tensor) -> Tensor:
    """Have a tensor counted as the host's that something else made there; return it."""
    _STORAGES.add(tensor.untyped_storage())
    return tensor


def is_on_host(tensor: Tensor) -> bool:
    """Return whether a tensor is one that was made or named here, or a view of one."""
    return tensor.layout is torch.strided and tensor.untyped_storage() in _STORAGES
