"""Every estimator of how far the actor is from its reference, by hand and in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.algorithms.penalties import kl_penalised_rewards, kl_penalty

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)


def _expected(estimator: str) -> float:
    return (POLICY * kl_penalty(POLICY.log(), REFERENCE.log(), estimator)).sum().item()


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p * (p / q).log()).sum().item()


def test_the_unbiased_ones_have_the_divergence_as_their_mean():
    """Exactly, over a policy of three symbols."""
    mixed = (POLICY + REFERENCE) / 2
    divergence = 0.5 * _kl(POLICY, mixed) + 0.5 * _kl(REFERENCE, mixed)
    assert _expected("k1") == pytest.approx(_kl(POLICY, REFERENCE), abs=1e-12)
    assert _expected("k3") == pytest.approx(_kl(POLICY, REFERENCE), abs=1e-12)
    assert _expected("js_unbiased") == pytest.approx(divergence, abs=1e-12)


def test_js_is_what_its_definition_says():
    mixed = ((POLICY + REFERENCE) / 2).log()
    expected = 0.5 * ((POLICY.log() - mixed).clamp(min=0) + (REFERENCE.log() - mixed).clamp(min=0))
    assert torch.allclose(kl_penalty(POLICY.log(), REFERENCE.log(), "js"), expected, atol=1e-12, rtol=0)
    assert kl_penalty(torch.tensor(300.0), torch.tensor(0.0), "js").item() == pytest.approx(0.5 * math.log(2))


def test_js_is_symmetric_and_its_slope_at_most_a_quarter():
    difference = torch.linspace(-8, 8, 201, dtype=torch.float64, requires_grad=True)
    found = kl_penalty(difference, torch.zeros_like(difference), "js")
    assert torch.allclose(found, found.flip(0), atol=1e-12)
    found.sum().backward()
    assert difference.grad.abs().max() <= 0.25 + 1e-12


def test_squared_has_the_gradient_of_the_kl():
    """Over all symbols, where that of k1 vanishes."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)

    def gradient(estimator: str) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        loss = (logprobs.detach().exp() * kl_penalty(logprobs, REFERENCE.log(), estimator)).sum()
        return torch.autograd.grad(loss, logits)[0]

    exact = torch.autograd.grad((logits.softmax(0) * (logits.log_softmax(0) - REFERENCE.log())).sum(), logits)[0]
    assert torch.allclose(gradient("squared"), exact, atol=1e-12)
    assert torch.allclose(gradient("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_far_away_nothing_overflows():
    far = torch.tensor([-200.0, 200.0])
    for estimator in ("js", "js_unbiased", "squared"):
        assert torch.isfinite(kl_penalty(far, torch.zeros(2), estimator)).all()


def test_none_leaves_the_score_alone():
    mask = torch.tensor([[True, True, False]])
    found = kl_penalised_rewards(torch.tensor([2.0]), torch.randn(1, 3), torch.randn(1, 3), mask, 0.5, "none")
    assert found.tolist() == [[0.0, 2.0, 0.0]]
