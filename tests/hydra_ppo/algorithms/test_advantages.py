"""Advantages without a critic, λ by length, what comes after a response that was cut, and spread-out rewards."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hydra_ppo.algorithms.advantages import (
    bounded_values,
    gae,
    group_advantages,
    increase_variance,
    length_lambda,
    rewards_to_go,
    rloo_advantages,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_group_advantages_by_hand():
    found = group_advantages(torch.tensor([1.0, 3.0, 0.0, 8.0]), 2, by_std=False)
    assert found.tolist() == [-1.0, 1.0, -4.0, 4.0]
    scaled = group_advantages(torch.tensor([1.0, 3.0, 0.0, 8.0]), 2, by_std=True)
    assert scaled.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, -(0.5**0.5), 0.5**0.5], rel=1e-5)


def test_a_group_without_spread_teaches_nothing():
    same = torch.full((3,), 0.1)  # whose mean in fp32 is not exactly itself
    assert group_advantages(same, 3, by_std=True).tolist() == [0.0, 0.0, 0.0]
    assert rloo_advantages(same, 3).tolist() == [0.0, 0.0, 0.0]


def test_rloo_leaves_one_out():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert rloo_advantages(rewards, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_rewards_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 9.0, 9.0]])
    assert rewards_to_go(rewards, MASK, 0.5).tolist() == [[3.0, 4.0, 4.0], [3.0, 0.0, 0.0]]


def test_each_row_has_its_own_lambda():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    both, _ = gae(rewards, values, MASK, 0.9, torch.tensor([0.3, 0.8]))
    for row, value in enumerate((0.3, 0.8)):
        alone, _ = gae(rewards, values, MASK, 0.9, value)
        assert torch.allclose(both[row], alone[row])


def test_lambda_by_length():
    mask = torch.tensor([[True] * 40, [True] * 20 + [False] * 20, [True] * 4 + [False] * 36])
    assert length_lambda(mask, 0.05).tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert length_lambda(mask, 0.4).tolist() == pytest.approx([1 - 1 / 16, 1 - 1 / 8, 1 - 1 / 1.6])


def test_a_response_that_was_cut_goes_on_in_its_value():
    """By hand, γ 0.5, λ 1: the return of the last token is its reward and half of the value after it."""
    rewards, values = torch.tensor([[0.0, 0.0, 2.0], [4.0, 7.0, 7.0]]), torch.zeros(2, 3)
    _, returns = gae(rewards, values, MASK, 0.5, 1.0, after_last=torch.tensor([6.0, 2.0]))
    assert returns.tolist() == [[1.25, 2.5, 5.0], [5.0, 0.0, 0.0]]


def test_cutting_a_response_changes_nothing_where_the_value_is_right():
    """With λ 1 and the true value after the cut, the returns of the first half are those of the whole."""
    rewards = torch.tensor([[0.5, -1.0, 2.0, 3.0]])
    _, whole = gae(rewards, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 0.9, 1.0)
    rest = whole[:, 2]
    _, half = gae(rewards[:, :2], torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.9, 1.0, after_last=rest)
    assert torch.allclose(half, whole[:, :2])


def test_bounded_values():
    raw = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9])
    assert bounded_values(raw, -2.0, 6.0).tolist() == pytest.approx([-2.0, 0.0, 2.0, 4.0, 6.0], abs=1e-6)


def _by_enumeration(rewards: list[float], weights: list[float], low: float, high: float) -> list[float]:
    """Try every extreme point: the best k get the highest, the worst the lowest, the others the level that keeps the mean."""
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    p = [weights[i] / sum(weights) for i in order]
    mean = sum(a * rewards[i] for a, i in zip(p, order, strict=True))
    best, found = -1.0, None
    n = len(p)
    for k in range(n + 1):
        for last in range(k, n + 1):
            block = sum(p[k:last])
            rest = mean - high * sum(p[:k]) - low * sum(p[last:])
            if block == 0:
                if abs(rest) > 1e-12:
                    continue
                level = low
            else:
                level = rest / block
            if not low - 1e-12 <= level <= high + 1e-12:
                continue
            z = [high] * k + [level] * (last - k) + [low] * (n - last)
            value = sum(a * b * b for a, b in zip(p, z, strict=True))
            if value > best + 1e-15:
                best, found = value, z
    assert found is not None
    spread = [0.0] * n
    for place, row in enumerate(order):
        spread[row] = found[place]
    return spread


def test_spread_rewards_are_the_best_of_all_extreme_points():
    """1000 random groups of 2 to 9 responses."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(1000):
        n = int(torch.randint(2, 10, (1,), generator=generator))
        rewards = 4 * torch.rand(n, generator=generator, dtype=torch.float64) - 2
        logs = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
        low, high = torch.tensor(-2.0).double(), torch.tensor(2.0).double()
        found = increase_variance(rewards, logs, low, high, n)
        expected = _by_enumeration(rewards.tolist(), logs.softmax(0).tolist(), -2.0, 2.0)
        worst = max(worst, (found - torch.tensor(expected, dtype=torch.float64)).abs().max().item())
    assert worst < 1e-12


def test_spread_rewards_keep_mean_order_and_bounds_and_gain_variance():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(64 * 8, generator=generator, dtype=torch.float64)
    logs = torch.randn(64 * 8, generator=generator, dtype=torch.float64)
    found = increase_variance(rewards, logs, torch.tensor(0.0), torch.tensor(1.0), 8).view(64, 8)
    before, p = rewards.view(64, 8), logs.view(64, 8).softmax(1)
    assert torch.allclose((p * found).sum(1), (p * before).sum(1), atol=1e-12, rtol=0)
    assert found.min() >= 0
    assert found.max() <= 1
    for row, old in zip(found, before, strict=True):
        ranked = row[old.argsort()].tolist()
        assert all(a <= b for a, b in pairwise(ranked))
    assert ((p * found**2).sum(1) >= (p * before**2).sum(1) - 1e-12).all()


def test_equal_rewards_stay_equal():
    """By hand: weights 1/4 each, rewards 1, 0, 0, -1 in [-2, 2]: half of the weight gets the highest, and the tie shares it."""
    found = increase_variance(torch.tensor([1.0, 0.0, 0.0, -1.0]), torch.zeros(4), torch.tensor(-2.0), torch.tensor(2.0), 4)
    assert found.tolist() == pytest.approx([2.0, 0.0, 0.0, -2.0])


def test_nothing_to_spread():
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    same = torch.tensor([0.3, 0.3])
    assert increase_variance(same, torch.randn(2), low, high, 2).tolist() == same.tolist()
    assert increase_variance(torch.tensor([0.3, 0.5]), torch.randn(2), low, high, 1).tolist() == pytest.approx([0.3, 0.5])
    flat = torch.tensor([1.0, 1.0])
    assert increase_variance(flat, torch.zeros(2), flat[0], flat[0], 2).tolist() == flat.tolist()


def test_a_reference_that_is_all_but_sure_makes_a_threshold():
    """The likeliest response keeps its reward, those above get the highest, those below the lowest."""
    logs = torch.tensor([-400.0, 0.0, -500.0, -450.0])
    found = increase_variance(torch.tensor([0.9, 0.2, 0.1, 0.4]), logs, torch.tensor(0.0), torch.tensor(1.0), 4)
    assert found.tolist() == pytest.approx([1.0, 0.2, 0.0, 1.0])
