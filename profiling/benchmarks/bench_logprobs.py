"""Log-probs of given tokens straight from hidden states, against full logits as models return them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.profiling.benchmarks.measure import measure

HIDDEN, TOKENS = 512, 512
ROUNDS = {32_000: 7, 128_256: 3}
"""By vocabulary, those of Llama 2 and Llama 3."""
TOLERANCE = 1e-4
"""Absolute, of fp32 log-probs (nats) and of gradients that are of order 1 here."""


@dataclass(frozen=True)
class Inputs:
    """What both ways start from.

    Attributes:
        hidden: (N, H), takes a gradient.
        tokens: (N,).
        weight: (V, H) of the head, frozen as it is in PPO.
        upstream: (N,) gradient that arrives at the log-probs.
    """

    hidden: Tensor
    tokens: Tensor
    weight: Tensor
    upstream: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all four."""
        return [self.hidden, self.tokens, self.weight, self.upstream]


def make_inputs(count: int, width: int, vocabulary: int) -> Inputs:
    """Draw `count` hidden states of `width` numbers and a head whose logits have a standard deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        torch.randn(count, width, generator=generator).requires_grad_(),
        torch.randint(vocabulary, (count,), generator=generator),
        torch.randn(vocabulary, width, generator=generator).div_(width**0.5),
        torch.randn(count, generator=generator),
    )


def from_hidden_states(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return log-probs (N,), nats, and the gradient (N, H); computes the entropy too, which PPO logs."""
    logprobs = token_logprobs(inputs.hidden, inputs.tokens, LMHead(inputs.weight)).logprobs
    return _with_gradient(logprobs, inputs)


def from_full_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return log-probs (N,), nats, and the gradient (N, H). Memory: three tensors of N x V.

    Whoever holds on to the logits, as most trainers do, has four.
    """
    log_p = torch.nn.functional.linear(inputs.hidden, inputs.weight).float().log_softmax(dim=-1)  # (N, V)
    logprobs = log_p.gather(1, inputs.tokens[:, None])[:, 0]
    del log_p
    return _with_gradient(logprobs, inputs)


def check_agreement(inputs: Inputs) -> None:
    """Raise an AssertionError where the two ways differ by more than `TOLERANCE`."""
    for found, expected in zip(from_hidden_states(inputs), from_full_logits(inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def _with_gradient(logprobs: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(logprobs, inputs.hidden, inputs.upstream)
    return logprobs.detach(), gradient


@pytest.mark.parametrize("vocabulary", ROUNDS)
def test_logprobs(benchmark: Any, vocabulary: int) -> None:
    inputs = make_inputs(TOKENS, HIDDEN, vocabulary)
    check_agreement(inputs)
    calls = {"hidden states": lambda: from_hidden_states(inputs), "full logits": lambda: from_full_logits(inputs)}
    title = f"log-probs of {TOKENS} tokens and their gradient, vocabulary {vocabulary}"
    alive = inputs.tensors()
    measure(benchmark, title, calls, rounds=ROUNDS[vocabulary], baseline="full logits", tokens=TOKENS, alive=alive)
