"""Activation checkpointing of decoder layers, on any version of transformers.

transformers' own runs in training mode alone, since 4.53 in a base class of its layers and before that in each backbone.
Here the forward pass of each layer is wrapped, once, and recomputed in the backward pass in either mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hydra_ppo.compute.host_checkpoints import kept_on_host

logger = logging.getLogger("hydra_ppo")

ContextFn = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
"""Returns what to be in during a layer's forward pass and during its recomputation; called once for each forward pass."""

CACHES = ("past_key_values", "past_key_value", "layer_past")
"""Names under which decoder layers are given a KV cache."""


class RecomputedForward:
    """The forward pass of one layer, checkpointed while that is enabled and gradients are asked for.

    An object, not a closure: a deep copy of the layer then gets one of its own.
    """

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.context_fn: ContextFn | None = None
        self.enabled = False
        self.offload = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.enabled and torch.is_grad_enabled()):
            return self.inner(*args, **kwargs)
        if any(kwargs.get(name) is not None for name in CACHES):  # which a second pass would fill a second time
            _warn_of_cache()
            return self.inner(*args, **kwargs)
        context: dict[str, Any] = {} if self.context_fn is None else {"context_fn": self.context_fn}
        if not self.offload:
            return checkpoint(self.inner, *args, use_reentrant=False, **context, **kwargs)
        inner = self.inner
        if not args and "hidden_states" in kwargs:  # a checkpoint saves what it is given by place, and keeps the rest as it is
            args, inner = (kwargs.pop("hidden_states"),), partial(_by_name, inner)
        with kept_on_host(args[0]) if args and isinstance(args[0], Tensor) else nullcontext():
            return checkpoint(inner, *args, use_reentrant=False, **context, **kwargs)


def _by_name(layer: Callable[..., Any], hidden_states: Tensor, **kwargs: Any) -> Any:
    return layer(hidden_states=hidden_states, **kwargs)


def enable_recompute(
    layers: Iterable[nn.Module], context_fn: ContextFn | None = None, enabled: bool = True, offload: bool = False
) -> None:
    """Recompute the activations of each layer in the backward pass, or stop doing so; in place, in either mode.

    Args:
        layers: decoder layers; each is wrapped the first time.
        context_fn: as `torch.utils.checkpoint.checkpoint` takes it.
        enabled: whether to recompute from now on.
        offload: keep in host memory what is kept.

    Memory: while enabled, a layer's input is kept for the backward pass in place of all that it computes.
    """
    for layer in layers:
        wrapped = vars(layer).get("forward")
        if not isinstance(wrapped, RecomputedForward):
            wrapped = RecomputedForward(layer.forward)
            layer.forward = wrapped
        wrapped.context_fn, wrapped.enabled, wrapped.offload = context_fn, enabled, offload


def remove_recompute(layers: Iterable[nn.Module]) -> None:
    """Take away what `enable_recompute` put around each layer's forward pass."""
    for layer in layers:
        wrapped = vars(layer).get("forward")
        if isinstance(wrapped, RecomputedForward):
            del layer.forward
            if getattr(wrapped.inner, "__func__", None) is not type(layer).forward:  # an instance's own, of another library
                layer.forward = wrapped.inner


def disable_native_checkpointing(model: nn.Module) -> None:
    """Switch off transformers' own checkpointing, which would recompute a layer a second time, and in any role."""
    module: Any  # nn.Module has no such attribute
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.gradient_checkpointing = False


_warned = False


def _warn_of_cache() -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning("a pass with gradients fills a KV cache, so that its activations are kept; set use_cache=False")
