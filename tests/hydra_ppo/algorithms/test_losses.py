"""Clip ranges apart, a bound on what a bad token may cost, and averages over tokens, sequences or the longest length."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.algorithms.losses import averaging_weights, policy_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def _loss(ratio: float, advantage: float, **options) -> float:
    logprobs = torch.tensor([[ratio]]).log()
    return policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), ONE, 0.2, **options).loss.item()


def test_the_upper_bound_may_be_another():
    assert _loss(1.5, 1.0) == pytest.approx(-1.2)
    assert _loss(1.5, 1.0, clip_range_high=0.28) == pytest.approx(-1.28)
    assert _loss(0.5, -1.0, clip_range_high=0.28) == pytest.approx(0.8)


def test_dual_clip_bounds_what_a_bad_token_costs():
    assert _loss(9.0, -1.0) == pytest.approx(9.0)
    assert _loss(9.0, -1.0, dual_clip=3.0) == pytest.approx(3.0)
    assert _loss(9.0, 1.0, dual_clip=3.0) == pytest.approx(-1.2)


MASK = torch.tensor([[True, True, True, True], [True, False, False, False]])
LOSSES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(("how", "expected"), [("tokens", 20 / 5), ("sequences", (10 / 4 + 10) / 2), ("longest", 20 / 16)])
def test_averages_by_hand(how, expected):
    count = MASK.sum()
    weights = averaging_weights(MASK, how, 2, count, 8)
    weighted = LOSSES if weights is None else LOSSES * weights
    assert (weighted.masked_fill(~MASK, 0.0).sum() / count).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["sequences", "longest"])
def test_micro_batches_add_up(how):
    count = MASK.sum()
    parts = [averaging_weights(MASK[i : i + 1], how, 2, count, 8) * LOSSES[i : i + 1] for i in (0, 1)]
    whole = averaging_weights(MASK, how, 2, count, 8) * LOSSES
    assert sum(part.masked_fill(~MASK[i : i + 1], 0).sum() for i, part in enumerate(parts)).item() == pytest.approx(
        whole.masked_fill(~MASK, 0).sum().item()
    )
