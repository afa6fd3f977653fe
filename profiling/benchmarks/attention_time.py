"""The time of attention itself, forward and backward, inside the very steps that are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.profiling.benchmarks.phases import PHASES, Clock
from hydra_ppo.rollout import lean_decoding


class AttentionClock(Clock):
    """Adds up seconds by phase: all of them, and in `attention` those of attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def paying_attention(self) -> Iterator[None]:
        """Count the block as attention itself."""
        begun = time.perf_counter()
        yield
        if self.phase is not None:
            self.attention[self.phase] += time.perf_counter() - begun


class _Timed(torch.autograd.Function):
    """Attention whose forward and backward pass each are a call of its own, so that both can be timed."""

    @staticmethod
    def forward(
        ctx: Any, clock: AttentionClock, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        ctx.clock = clock
        with clock.paying_attention(), torch.enable_grad():
            ctx.inputs = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))
            ctx.output = attention(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.clock.paying_attention():
            found = torch.autograd.grad(ctx.output, ctx.inputs, gradient)
        return None, None, *found


@contextmanager
def timed_attention(clock: AttentionClock) -> Iterator[None]:
    """Time every attention inside the block, backward passes included."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def timed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            return _Timed.apply(clock, partial(attention, **options), query, key, value)
        with clock.paying_attention():
            return attention(query, key, value, **options)

    products = lean_decoding.attend_by_products

    def timed_products(*args: Any) -> Tensor:
        with clock.paying_attention():
            return products(*args)

    torch.nn.functional.scaled_dot_product_attention = timed
    lean_decoding.attend_by_products = timed_products
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        lean_decoding.attend_by_products = products
