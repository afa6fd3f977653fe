"""Losses of reward training: numbers by hand, limits, optima that are known, and no overflow."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.algorithms.preferences import advantage_loss, divergent_loss, expected_loss, margin_loss, ranking_loss

CLOSE = 1e-6


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def test_a_margin_asks_for_more():
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 1.0])
    found = margin_loss(chosen, rejected, torch.tensor([1.0, 0.25]))
    assert found.tolist() == pytest.approx([softplus(-0.5), softplus(0.25)], abs=CLOSE)
    torch.testing.assert_close(margin_loss(chosen, rejected, torch.zeros(2)), ranking_loss(chosen, rejected))


def test_a_margin_is_of_the_pair_and_not_of_a_head():
    chosen = torch.tensor([[2.0, 3.0], [1.0, 0.0]])
    found = margin_loss(chosen, torch.zeros(2, 2), torch.tensor([1.0, 0.5]))
    assert found[0].tolist() == pytest.approx([softplus(-1.0), softplus(-2.0)], abs=CLOSE)
    assert found[1].tolist() == pytest.approx([softplus(-0.5), softplus(0.5)], abs=CLOSE)


def test_divergent_is_the_mean_over_the_tokens_that_count():
    chosen = torch.tensor([[[9.0], [1.0], [2.0]], [[3.0], [7.0], [7.0]]])
    rejected = torch.tensor([[[-9.0], [0.0], [2.5]], [[1.0], [-7.0], [-7.0]]])
    counts = torch.tensor([[False, True, True], [True, False, False]])
    found = divergent_loss(chosen, rejected, counts)
    # Pair 1: tokens 2 and 3, differences 1 and -0.5; pair 2: token 1 alone, difference 2.
    assert found[:, 0].tolist() == pytest.approx([(softplus(-1.0) + softplus(0.5)) / 2, softplus(-2.0)], abs=CLOSE)


def test_divergent_at_one_token_is_bradley_terry():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(4, 1, 3), torch.randn(4, 1, 3)
    found = divergent_loss(chosen, rejected, torch.ones(4, 1, dtype=torch.bool))
    torch.testing.assert_close(found, ranking_loss(chosen[:, 0], rejected[:, 0]))


def test_advantages_by_hand():
    found = advantage_loss(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.0]), 2.5)
    # a_c = 1, a_r = -0.5: difference 1.5, to the bounds 2.5 - 1 = 1.5 and 2.5 - 0.5 = 2
    assert found.item() == pytest.approx(2 * softplus(-1.5) + softplus(-2.0), abs=CLOSE)


def test_a_far_bound_leaves_bradley_terry():
    torch.manual_seed(0)
    chosen, rejected, expected = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5)
    found = advantage_loss(chosen, rejected, expected, 1e4)
    torch.testing.assert_close(found, ranking_loss(chosen, rejected))


@pytest.mark.parametrize("bound", [2.5, 1.0, 6.0])
def test_one_pair_alone_settles_at_a_third_of_the_bound(bound):
    """s(-2u) = s(u - m), so u = m / 3; the expected reward finds the middle by itself, wherever the scores begin."""
    scores = torch.tensor([4.0, 3.5], dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores, expected], lr=0.5)
    for _ in range(4000):
        optimizer.zero_grad()
        chosen, rejected = scores[:1], scores[1:]
        (advantage_loss(chosen, rejected, expected, bound) + expected_loss(expected, chosen, rejected)).sum().backward()
        optimizer.step()
    advantages = (scores - expected).tolist()
    assert advantages == pytest.approx([bound / 3, -bound / 3], abs=1e-6)
    assert (scores[0] - scores[1]).item() == pytest.approx(2 * bound / 3, abs=1e-6)


def test_the_expected_reward_is_trained_by_its_own_loss_alone():
    scores = [torch.tensor([1.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    expected = torch.tensor([0.0], requires_grad=True)
    advantage_loss(*scores, expected, 2.5).sum().backward()
    assert expected.grad is None
    for score in scores:
        score.grad = None
    found = expected_loss(expected, *scores)
    assert found.item() == pytest.approx(4.0)  # (0 - (1 + 3) / 2)²
    found.sum().backward()
    assert expected.grad.item() == pytest.approx(-4.0)
    assert [score.grad for score in scores] == [None, None]


def test_of_several_heads_the_mean_is_to_be_expected():
    found = expected_loss(torch.tensor([1.0]), torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 4.0]]))
    assert found.item() == pytest.approx((1.0 - 2.0) ** 2)  # heads say 0.5 and 3.5, their mean is 2


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_far_scores_overflow_nowhere(size):
    far = torch.tensor([[-size]], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1, 1, dtype=torch.bool)
    losses = [
        ranking_loss(far, -far),
        margin_loss(far, -far, zero),
        divergent_loss(far[None], -far[None], one),
        advantage_loss(far, -far, zero, 2.5),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), far, retain_graph=True)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient.abs().item() > 0.9
