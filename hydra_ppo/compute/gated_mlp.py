"""Gated MLPs, down(act(gate(x)) * up(x)), that keep two wide activations for the backward pass and not four.

The hidden layer of such an MLP is the widest thing in a Llama, Mistral, Qwen or Gemma layer. Autograd keeps gate(x),
act(gate(x)), up(x) and their product. The product and act(gate(x)) are elementwise work, done again in the backward pass.

Memory: saves 2 x N x I of the MLP, I its intermediate size, instead of 4 x N x I.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hydra_ppo.compute.bases import Base, base_of
from hydra_ppo.compute.lora import Adapter, active_adapter, run
from hydra_ppo.compute.products import times


class Activation(NamedTuple):
    """An elementwise function and its backward pass: (gradient, input) to the gradient of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


# Functions of this module, by whose names a model can be pickled: torch's own have none.
def _silu(x: Tensor) -> Tensor:
    return torch.ops.aten.silu(x)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(gradient, x)


def _gelu_forward(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu(x, approximate=approximate)


def _gelu_backward(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient, x, approximate=approximate)


def _gelu(approximate: str) -> Activation:
    return Activation(partial(_gelu_forward, approximate=approximate), partial(_gelu_backward, approximate=approximate))


SILU = Activation(_silu, _silu_backward)
ACTIVATIONS = {
    "SiLU": SILU,
    "SiLUActivation": SILU,
    "GELUTanh": _gelu("tanh"),
    "PytorchGELUTanh": _gelu("tanh"),  # its name before transformers 5
    "GELUActivation": _gelu("none"),
}
"""By class name of transformers' activation modules."""

PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
PRODUCT = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


def use_lean_mlps(layers: nn.Module) -> None:
    """Give every gated MLP inside `layers` this forward pass, in place; what is not exactly one is left as it is."""
    for mlp in layers.modules():
        if "forward" in vars(mlp) or not all(hasattr(mlp, name) for name in PARTS) or not _is_gated(type(mlp)):
            continue
        down = mlp.get_submodule("down_proj")
        base = base_of(down.get_base_layer() if isinstance(down, LoraLayer) else down)
        activation = ACTIVATIONS.get(type(mlp.act_fn).__name__)
        if base is not None and activation is not None:
            mlp.forward = partial(_forward, mlp, base, activation)


def activation_of(mlp: nn.Module) -> Activation | None:
    """Return the activation of an MLP that has this forward pass, or has it over pieces; None of any other."""
    forward = vars(mlp).get("forward")
    forward = getattr(forward, "inner", forward)  # `tiled_mlp` wraps it
    return forward.args[2] if isinstance(forward, partial) and forward.func is _forward else None


def _is_gated(kind: type[nn.Module]) -> bool:
    """Return whether a module's forward pass is the product above and nothing else, by its source."""
    return _is_product(kind.forward)


@lru_cache
def _is_product(forward: Callable[..., Any]) -> bool:
    try:
        source = textwrap.dedent(inspect.getsource(forward))
    except (OSError, TypeError):  # made at run time
        return False
    written = ast.parse(source).body[0]
    body = [ast.unparse(line) for line in written.body] if isinstance(written, ast.FunctionDef) else []
    return body in ([f"return {PRODUCT}"], [f"down_proj = {PRODUCT}", "return down_proj"])


def _forward(mlp: Any, base: Base, activation: Activation, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    try:
        adapter = active_adapter(mlp.down_proj)
        ours = base.takes(gate) and not base.trained
    except LookupError:
        ours = False
    if not ours:
        return mlp.down_proj(mlp.act_fn(gate) * up)
    if torch.is_grad_enabled():
        return _gated_linear(gate, up, base, activation, *(adapter or (None, None, 1.0)))
    hidden = activation.forward(gate).mul_(up)
    del gate, up
    return run(hidden, base, adapter)


class _GatedLinear(torch.autograd.Function):
    """y = W h + b + scaling * B (A h) with h = act(gate) * up. Saves gate and up; recomputes h."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        base: Base,
        activation: Activation,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        hidden = activation.forward(gate).mul_(up)
        y = base.product(hidden)
        low = Adapter(a, b, scaling).add_(y, hidden) if a is not None and b is not None else None
        ctx.base, ctx.activation, ctx.scaling = base, activation, scaling
        ctx.save_for_backward(gate, up, low, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, low, a, b = ctx.saved_tensors
        needs_gate, needs_up, _, _, train_a, train_b, _ = ctx.needs_input_grad
        d_hidden = ctx.base.transposed_product(gradient)
        active = ctx.activation.forward(gate)
        d_a = d_b = None
        if a is not None:
            adapter, flat = Adapter(a, b, ctx.scaling), gradient.flatten(0, -2)
            d_low = adapter.gradient_of_low(flat)
            d_b = adapter.gradient_of_b(low, flat) if train_b else None
            d_a = times(d_low.T, (active * up).flatten(0, -2)).to(a.dtype) if train_a else None
            d_hidden.view(-1, d_hidden.shape[-1]).addmm_(d_low, a.to(d_low.dtype))
        d_up = active.mul_(d_hidden) if needs_up else None
        d_gate = ctx.activation.backward(d_hidden.mul_(up), gate) if needs_gate else None
        return d_gate, d_up, None, None, d_a, d_b, None


_gated_linear: Callable[..., Tensor] = _GatedLinear.apply  # which torch gives no types
