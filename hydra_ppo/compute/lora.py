"""The forward pass of a linear layer with at most one active LoRA adapter, in the compute type.

PEFT's own casts the input to the adapter's fp32, multiplies there, clones what a 4-bit layer returned and adds: several
copies of every activation, and a node of the autograd graph for each. Here y = W x + b + scaling * B (A x) is one node. The
adapter's part is added in place, forward and backward; kept are x, which is there anyway, and N x r numbers. Results equal
PEFT's in fp32; in bf16 they differ by the rounding of one more product. Checkpoints are PEFT's, unchanged.

Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hydra_ppo.compute.bases import Base, Dense, base_of
from hydra_ppo.compute.products import linear, times


class Adapter(NamedTuple):
    """The active adapter of one layer: A (r, I), B (O, r), both in fp32, and what their product is multiplied with."""

    a: Tensor
    b: Tensor
    scaling: float

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add scaling * B (A x) to y (..., O) in place; return A x, (N, r)."""
        low = linear(x.flatten(0, -2), self.a.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(low, self.b.to(x.dtype).T, alpha=self.scaling)
        return low

    def gradient_of_low(self, gradient: Tensor) -> Tensor:
        """Return d loss / d (A x), (N, r), from d loss / d y (N, O)."""
        return times(gradient, self.b.to(gradient.dtype)).mul_(self.scaling)

    def gradient_of_b(self, low: Tensor, gradient: Tensor) -> Tensor:
        """Return d loss / d B, (O, r), from A x (N, r) and d loss / d y (N, O)."""
        return times(low.T, gradient).mul_(self.scaling).T.to(self.b.dtype)  # this way round: wide rows


def use_lean_lora(model: nn.Module) -> None:
    """Give every LoRA layer of `model` this forward pass, in place; layers that have it already keep it."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "forward" not in vars(layer):
            layer.forward = partial(_forward, layer, base_of(layer.get_base_layer()))


def use_lean_linear(layers: nn.Module) -> None:
    """Do the same for the linear layers inside `layers` that have no adapter."""
    adapted = {id(part.get_base_layer()) for part in layers.modules() if isinstance(part, LoraLayer)}
    for layer in layers.modules():
        base = base_of(layer) if id(layer) not in adapted and not isinstance(layer, LoraLayer) else None
        if isinstance(base, Dense):
            layer.forward = partial(_plain_forward, layer, base)


def base_under(layer: nn.Module) -> Base | None:
    """Return the frozen half of a layer that has this forward pass, or its class's own; None where another library's runs."""
    forward = vars(layer).get("forward")
    if isinstance(forward, partial) and forward.func in (_forward, _plain_forward):
        return forward.args[1]
    return None if isinstance(layer, LoraLayer) else base_of(layer)


def active_adapter(layer: nn.Module) -> Adapter | None:
    """Return the one adapter that is active on a layer; None where there is none.

    Raises:
        LookupError: where there are several, or it is merged into the weight.
    """
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return None
    # Past nn.Module's __getattr__: a decoding step asks every layer, and this is a tenth of its time otherwise.
    parts: dict[str, Any] = layer._modules
    down, up = parts["lora_A"]._modules, parts["lora_B"]._modules
    names = [name for name in layer.active_adapters if name in down]
    if len(names) > 1 or layer.merged:
        raise LookupError
    if not names:
        return None
    (name,) = names
    return Adapter(down[name]._parameters["weight"], up[name]._parameters["weight"], layer.scaling[name])


def _plain_forward(layer: nn.Module, base: Base, x: Tensor) -> Tensor:
    return run(x, base, None) if base.takes(x) else type(layer).forward(layer, x)


def _forward(layer: Any, base: Base | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or layer.merged:  # mixed batches of adapters, merged weights: PEFT knows how
        return type(layer).forward(layer, x, *args, **kwargs)
    try:
        adapter = active_adapter(layer)
    except LookupError:
        return type(layer).forward(layer, x)
    if base is not None and base.takes(x):
        return run(x, base, adapter)
    result = layer.base_layer(x)
    if adapter is None:
        return result
    # Autocast took its part in the base layer; it casts some of the products below and not others.
    with torch.autocast(x.device.type, enabled=False):
        return _add_lora(result, x, *adapter)


def run(x: Tensor, base: Base, adapter: Adapter | None) -> Tensor:
    """Return the layer's output (..., O) for x (..., I)."""
    if torch.is_grad_enabled():
        return _linear(x, base, base.weight, base.bias, *(adapter or (None, None, 1.0)))
    y = base.product(x)
    if adapter is not None:
        adapter.add_(y, x)
    return y


class _Linear(torch.autograd.Function):
    """y = W x + b + scaling * B (A x). Saves x where something of it is trained, and N x r numbers; recomputes nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Base,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        y = base.product(x)
        low = Adapter(a, b, scaling).add_(y, x) if a is not None and b is not None else None
        ctx.base, ctx.scaling = base, scaling
        _, _, train_weight, _, train_a, train_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if train_weight or train_a else None, low if train_b else None, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs_x, _, train_weight, train_bias, train_a, train_b, _ = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        d_x = ctx.base.transposed_product(gradient) if needs_x else None
        d_weight = times(flat.T, x.flatten(0, -2)) if train_weight else None
        d_bias = flat.sum(dim=0) if train_bias else None
        d_a = d_b = None
        if a is not None:
            adapter = Adapter(a, b, ctx.scaling)
            d_low = adapter.gradient_of_low(flat)
            d_b = adapter.gradient_of_b(low, flat) if train_b else None
            d_a = times(d_low.T, x.flatten(0, -2)).to(a.dtype) if train_a else None
            if d_x is not None:
                d_x.view(-1, d_x.shape[-1]).addmm_(d_low, a.to(d_low.dtype))
        return d_x, None, d_weight, d_bias, d_a, d_b, None


_linear: Callable[..., Tensor] = _Linear.apply  # which torch gives no types


class _AddLora(torch.autograd.Function):
    """result (..., O) + scaling * (x (..., I) A^T) B^T. Saves x and N x r numbers; recomputes nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        dtype = result.dtype
        low = (x.flatten(0, -2).to(dtype) @ a.to(dtype).T).mul_(scaling)  # (N, r)
        flat = result.view(-1, result.shape[-1])
        if not any(ctx.needs_input_grad):
            flat.addmm_(low, b.to(dtype).T)
            ctx.mark_dirty(result)
            return result
        ctx.scaling = scaling
        ctx.save_for_backward(x, low, a, b)
        # Autograd forbids in place: bitsandbytes returns a view. Nor may a view leave, to which Falcon adds in place.
        added = torch.empty_like(result, memory_format=torch.contiguous_format)
        torch.addmm(flat, low, b.to(dtype).T, out=added.view(-1, added.shape[-1]))
        return added

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs_result, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        dtype = gradient.dtype
        flat = gradient.flatten(0, -2)
        d_b = (flat.T @ low).to(b.dtype) if needs_b else None
        d_a = d_x = None
        if needs_a or needs_x:
            d_low = (flat @ b.to(dtype)).mul_(ctx.scaling)  # (N, r)
            d_a = (d_low.T @ x.flatten(0, -2).to(dtype)).to(a.dtype) if needs_a else None
            d_x = (d_low @ a.to(dtype)).view_as(x).to(x.dtype) if needs_x else None
        return gradient if needs_result else None, d_x, d_a, d_b, None


_add_lora: Callable[..., Tensor] = _AddLora.apply
