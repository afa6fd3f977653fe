"""How k heads are combined, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.algorithms.ensembles import combine_members, spread_of

MEMBERS = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])  # means 3 and 4, unbiased variances 7 and 0


@pytest.mark.parametrize(
    ("aggregate", "coef", "expected"),
    [
        ("mean", 9.0, [3.0, 4.0]),
        ("minimum", 9.0, [1.0, 4.0]),
        ("variance", 0.5, [3.0 - 0.5 * 7.0, 4.0]),
        ("lcb", 2.0, [3.0 - 2.0 * math.sqrt(7.0), 4.0]),
    ],
)
def test_by_hand(aggregate, coef, expected):
    assert combine_members(MEMBERS, aggregate, coef).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_member_alone_has_a_mean_and_a_minimum_and_no_spread():
    one = MEMBERS[:, :1]
    assert combine_members(one, "mean", 1.0).tolist() == combine_members(one, "minimum", 1.0).tolist() == [1.0, 4.0]
    assert spread_of(one).tolist() == [0.0, 0.0]
    for aggregate in ("variance", "lcb"):
        with pytest.raises(ValueError, match="needs two members or more"):
            combine_members(one, aggregate, 1.0)


def test_spread_is_the_unbiased_deviation():
    assert spread_of(MEMBERS).tolist() == pytest.approx([math.sqrt(7.0), 0.0])


def test_what_is_no_table_of_members_is_refused():
    with pytest.raises(ValueError, match="is not mean, minimum"):
        combine_members(MEMBERS, "median", 1.0)
    for bad in (MEMBERS[0], MEMBERS[:, :0]):
        with pytest.raises(ValueError, match=r"is not \(B, k\)"):
            combine_members(bad, "mean", 1.0)
