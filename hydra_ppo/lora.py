"""The forward pass of one active LoRA adapter, in the compute type.

PEFT's own casts the input to the adapter's fp32, multiplies there, clones what a 4-bit layer returned and adds: several
copies of every activation. Here y + scaling * (x A^T) B^T is one multiply-add in the base's compute type (in place while no
gradient is asked for), and the backward pass keeps x, which is there anyway, and N x r numbers. Results equal PEFT's in fp32;
in bf16 they differ by the rounding of one more product. Checkpoints are PEFT's, unchanged.

Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def use_lean_lora(model: nn.Module) -> None:
    """Give every LoRA layer of `model` this forward pass, in place; layers that have it already keep it."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "forward" not in vars(layer):
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or layer.merged:  # mixed batches of adapters, merged weights: PEFT knows how
        return type(layer).forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    # Autocast took its part in the base layer; it casts some of the products below and not others.
    with torch.autocast(x.device.type, enabled=False):
        for name in layer.active_adapters:
            if name in layer.lora_A:
                result = _AddLora.apply(result, x, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return result


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
        return flat.addmm(low, b.to(dtype).T).view_as(result)  # autograd forbids in place: bitsandbytes returns a view

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
