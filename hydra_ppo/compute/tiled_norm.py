"""Norms over pieces of a row, so that their copies in fp32 are as long as a piece.

An RMS norm in bf16 casts its input to fp32, squares it and multiplies it there; autograd keeps one of these copies, twice the
input's size, which a piece's backward pass computes anew here. Every row of numbers is normalised for itself, so pieces give
the same values to the last bit, and gradients that differ by the order in which autograd adds two of them.

Memory: saves the norm's input, which most often is the residual stream and there anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("RMSNorm", "LayerNorm")
"""How names of the classes end whose forward pass normalises each row of the last dimension for itself."""


def use_tiled_norms(model: nn.Module, numbers: int) -> None:
    """Run the frozen norms inside `model` over pieces of this many numbers, in place; one that takes more than x is left."""
    for norm in model.modules():
        if not type(norm).__name__.endswith(KINDS) or "forward" in vars(norm) or list(norm.children()):
            continue
        if len(inspect.signature(norm.forward).parameters) == 1:
            norm.forward = TiledNorm(norm, numbers)


def runs_its_own(module: nn.Module) -> bool:
    """Return whether a module runs its class's forward pass, be it over pieces."""
    forward = vars(module).get("forward")
    return forward is None or isinstance(forward, TiledNorm)


class TiledNorm:
    """The forward pass of one norm, over pieces where the input is larger than one."""

    def __init__(self, norm: nn.Module, numbers: int) -> None:
        self.norm, self.numbers = norm, numbers

    def __call__(self, x: Tensor) -> Tensor:
        rows = max(1, self.numbers // x.shape[-1])
        if x.shape[:-1].numel() <= rows or any(weight.requires_grad for weight in self.norm.parameters(recurse=False)):
            return self.inner(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _tiled(x, self, rows)
        return self.pieces(x, rows)

    def inner(self, x: Tensor) -> Tensor:
        """Return what the norm makes of x."""
        return type(self.norm).forward(self.norm, x)

    def pieces(self, x: Tensor, rows: int) -> Tensor:
        """Return the same, without a graph, from pieces of that many rows."""
        y: Tensor | None = None
        start = 0
        with torch.no_grad():
            for piece in x.reshape(-1, x.shape[-1]).split(rows):
                found = self.inner(piece)
                if y is None:
                    y = found.new_empty(x.shape)
                y.view(-1, x.shape[-1])[start : start + len(piece)] = found
                start += len(piece)
        assert y is not None
        return y


class _Tiled(torch.autograd.Function):
    """Saves x; recomputes each piece with a graph of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: TiledNorm, rows: int) -> Tensor:
        ctx.norm, ctx.rows = norm, rows
        ctx.save_for_backward(x)
        return norm.pieces(x, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        width = x.shape[-1]
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        pieces = zip(*(part.reshape(-1, width).split(ctx.rows) for part in (x, gradient, d_x)), strict=True)
        for piece, d_piece, out in pieces:
            with torch.enable_grad():
                alone = piece.detach().requires_grad_()
                found = ctx.norm.inner(alone)
            out.copy_(torch.autograd.grad(found, alone, d_piece)[0])
        return d_x, None, None


_tiled: Callable[..., Tensor] = _Tiled.apply  # which torch gives no types
