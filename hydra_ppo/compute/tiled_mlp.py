"""Gated MLPs over pieces of a row, so that nothing of size tokens x I is made, I the MLP's intermediate size.

`gated_mlp` keeps gate(x) and up(x) for the backward pass, 2 x N x I numbers for N tokens, and has two more alive for a moment:
3.5 GiB in bf16 for 32768 tokens of Llama-3.1-8B. Here a piece of some tokens goes through all three layers before the next
one does, and the backward pass does the same: it computes gate(x) and up(x) of a piece anew.

Costs: the products of gate and up once more in the backward pass. Under checkpointing they replace the whole MLP's in the
recomputation of the layer, which ends where the MLP's input is known. A 4-bit weight is dequantised once for each piece
and product, so pieces should have some hundred tokens.

Memory: saves the MLP's input, N x H. While a piece is run, three tensors of piece x I, in the backward pass four.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydra_ppo.compute.bases import Base
from hydra_ppo.compute.gated_mlp import Activation, activation_of
from hydra_ppo.compute.lora import Adapter, active_adapter, base_under, run
from hydra_ppo.compute.products import linear, times

logger = logging.getLogger("hydra_ppo")

LAYERS = ("gate_proj", "up_proj", "down_proj")


def use_tiled_mlps(layers: nn.Module, tokens: int) -> None:
    """Run gated MLPs inside `layers` over pieces of this many tokens, in place; after `use_lean_mlps`, which finds them."""
    for mlp in layers.modules():
        activation, inner = activation_of(mlp), vars(mlp).get("forward")
        if activation is None or isinstance(inner, TiledForward):
            continue
        bases = [base_under(mlp.get_submodule(name)) for name in LAYERS]
        known = [base for base in bases if base is not None]
        if len(known) == len(bases):
            mlp.forward = TiledForward(mlp, inner, activation, known, tokens)


def run_whole(layer: nn.Module) -> list[str]:
    """Return what holds matrices in a decoder layer beside its attention and is not run over pieces: `name (class)` of each."""
    tiled = tuple(f"{name}." for name, part in layer.named_modules() if isinstance(vars(part).get("forward"), TiledForward))
    left = [
        name
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1 and not name.startswith(tiled) and not re.search("att", name.lower())
    ]
    found = dict.fromkeys(name.split(".")[0] for name in left)
    return [f"{name} ({type(layer.get_submodule(name)).__name__})" for name in found if hasattr(layer, name)]


class TiledForward:
    """The forward pass of one gated MLP, over pieces where there are more tokens than one piece has.

    An object, not a closure: a deep copy of the MLP then gets one of its own.
    """

    def __init__(self, mlp: nn.Module, inner: Any, activation: Activation, bases: Sequence[Base], tokens: int) -> None:
        self.mlp, self.inner, self.activation, self.bases, self.tokens = mlp, inner, activation, bases, tokens

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() <= self.tokens:
            return self.inner(x)
        try:
            adapters = [active_adapter(self.mlp.get_submodule(name)) for name in LAYERS]
        except LookupError:
            return self._whole(x, "has several adapters at once, or merged ones,")
        if any(base.trained for base in self.bases):
            return self._whole(x, "is trained itself")
        if not all(base.takes(x) for base in self.bases):
            return self._whole(x, "runs under autocast or has hooks")
        if torch.is_grad_enabled():
            weights = [weight for adapter in adapters for weight in (adapter[:2] if adapter is not None else (None, None))]
            kept = _keep(x, *weights)
            if kept.grad_fn is not None:
                scalings = [1.0 if adapter is None else adapter.scaling for adapter in adapters]
                return _tiled(kept, kept.grad_fn, x.requires_grad, self, scalings, *weights)
        return self.pieces(x, adapters)

    def pieces(self, x: Tensor, adapters: Sequence[Adapter | None]) -> Tensor:
        """Return the output (..., H) for x (..., H), without a graph."""
        flat = x.flatten(0, -2)
        y = torch.empty_like(flat)
        gate, up, down = zip(self.bases, adapters, strict=True)
        with torch.no_grad():
            for piece, out in zip(flat.split(self.tokens), y.split(self.tokens), strict=True):
                hidden = self.activation.forward(run(piece, *gate)).mul_(run(piece, *up))
                out.copy_(run(hidden, *down))
        return y.view(x.shape)

    def _whole(self, x: Tensor, why: str) -> Tensor:
        _warn(f"model.tile_tokens={self.tokens}: an MLP that {why} is run whole")
        return self.inner(x)


class _Keep(torch.autograd.Function):
    """Hands x on, and saves it, with the weights, for the pass that comes next.

    That saves nothing itself: what is saved last in a layer is where its recomputation ends, before that pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


_keep: Callable[..., Tensor] = _Keep.apply  # which torch gives no types


class _Tiled(torch.autograd.Function):
    """The MLP over pieces; takes what `_Keep` saved, and recomputes gate(x) and up(x) of each piece."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keeper: Any, needs_x: bool, mlp: TiledForward, scalings: list[float], *weights: Tensor | None
    ) -> Tensor:
        ctx.keeper, ctx.needs_x, ctx.mlp, ctx.scalings = keeper, needs_x, mlp, scalings
        return mlp.pieces(x, _adapters(weights, scalings))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.keeper.saved_tensors
        mlp: TiledForward = ctx.mlp
        trained = _pairs(ctx.needs_input_grad[5:])
        gate, up, down = map(_Part, mlp.bases, _adapters(weights, ctx.scalings), trained)
        flat = x.flatten(0, -2)
        d_x = torch.empty_like(flat) if ctx.needs_x else None
        pieces = [part.split(mlp.tokens) for part in (flat, gradient.flatten(0, -2))]
        for number, (piece, d_piece) in enumerate(zip(*pieces, strict=True)):
            found = _piece_backward(piece, d_piece, mlp.activation, gate, up, down, ctx.needs_x)
            if d_x is not None and found is not None:
                d_x[number * mlp.tokens :][: len(piece)] = found
        of_adapters = [found for part in (gate, up, down) for found in (part.d_a, part.d_b)]
        return None if d_x is None else d_x.view(x.shape), None, None, None, None, *of_adapters


_tiled: Callable[..., Tensor] = _Tiled.apply


class _Part:
    """One of the three layers, and the gradients of its adapter, summed over the pieces so far, in the adapter's type."""

    def __init__(self, base: Base, adapter: Adapter | None, trained: tuple[bool, bool]) -> None:
        self.base, self.adapter = base, adapter
        self.train_a, self.train_b = trained
        self.d_a: Tensor | None = None
        self.d_b: Tensor | None = None

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return y and A x, where there is an adapter."""
        y = self.base.product(x)
        return y, None if self.adapter is None else self.adapter.add_(y, x)

    def low(self, x: Tensor) -> Tensor | None:
        """Return A x, where there is an adapter."""
        return None if self.adapter is None else linear(x, self.adapter.a.to(x.dtype))

    def learn(self, x: Tensor, low: Tensor | None, gradient: Tensor) -> Tensor | None:
        """Add the adapter's gradients from x (n, I), A x (n, r) and d loss / d y (n, O); return d loss / d (A x)."""
        if self.adapter is None or low is None:
            return None
        d_low = self.adapter.gradient_of_low(gradient)
        if self.train_b:
            self.d_b = _add(self.d_b, self.adapter.gradient_of_b(low, gradient))
        if self.train_a:
            self.d_a = _add(self.d_a, times(d_low.T, x).to(self.adapter.a.dtype))
        return d_low

    def back(self, gradient: Tensor, d_low: Tensor | None) -> Tensor:
        """Return d loss / d x (n, I), in memory of its own."""
        d_x = self.base.transposed_product(gradient)
        return d_x if d_low is None or self.adapter is None else d_x.addmm_(d_low, self.adapter.a.to(d_low.dtype))


def _piece_backward(
    x: Tensor, gradient: Tensor, activation: Activation, gate: _Part, up: _Part, down: _Part, needs_x: bool
) -> Tensor | None:
    """Go back through the MLP of one piece x (n, H), from d loss / d output (n, H); return d loss / d x."""
    gated, low_of_gate = gate.product(x)
    upped, low_of_up = up.product(x)
    active = activation.forward(gated)
    d_low = None
    if down.adapter is not None:
        hidden = active * upped
        d_low = down.learn(hidden, down.low(hidden), gradient)
        del hidden
    d_hidden = down.back(gradient, d_low)
    d_up = active.mul_(d_hidden)
    d_gate = activation.backward(d_hidden.mul_(upped), gated)
    del active, d_hidden, gated, upped
    d_low = gate.learn(x, low_of_gate, d_gate)
    d_x = gate.back(d_gate, d_low) if needs_x else None
    del d_gate
    d_low = up.learn(x, low_of_up, d_up)
    return None if d_x is None else d_x.add_(up.back(d_up, d_low))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _adapters(weights: Sequence[Tensor | None], scalings: Sequence[float]) -> list[Adapter | None]:
    pairs = zip(_pairs(weights), scalings, strict=True)
    return [None if a is None or b is None else Adapter(a, b, scaling) for (a, b), scaling in pairs]


_said: set[str] = set()


def _warn(line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.warning(line)
