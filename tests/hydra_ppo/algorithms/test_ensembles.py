"""What members say together, and how far apart they are: numbers by hand, and identities."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.algorithms.ensembles import combine_members, disagreements, spread

MEMBERS = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
# Row 1: mean 3, deviations -2, -1, 3, squares 4 + 1 + 9 = 14, by k - 1 = 2 the variance 7; row 2: mean 4, variance 0.


@pytest.mark.parametrize(
    ("aggregate", "coef", "expected"),
    [
        ("mean", 0.5, [3.0, 4.0]),
        ("minimum", 0.5, [1.0, 4.0]),
        ("variance", 0.5, [3.0 - 0.5 * 7.0, 4.0]),
        ("lcb", 0.5, [3.0 - 0.5 * 7.0**0.5, 4.0]),
        ("variance", 0.0, [3.0, 4.0]),
    ],
)
def test_by_hand(aggregate, coef, expected):
    assert combine_members(MEMBERS, aggregate, coef).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("aggregate", ["mean", "minimum", "variance", "lcb"])
def test_one_member_is_itself(aggregate):
    one = torch.tensor([[1.5], [-2.0]])
    assert combine_members(one, aggregate, 3.0).tolist() == [1.5, -2.0]
    assert spread(one).tolist() == [0.0, 0.0]


def test_another_aggregate_is_refused():
    with pytest.raises(ValueError, match="aggregate='median' is none"):
        combine_members(MEMBERS, "median", 0.0)


def test_who_disagrees_about_neighbours():
    # Members by response: A above B above C; the second member puts B above A; C against A (around the end) is agreed on.
    members = torch.tensor([[3.0, 2.0], [2.0, 3.0], [1.0, 1.0]])
    assert disagreements(members).tolist() == [True, False, False]
    # A tie is on nobody's side: 1 = 1 for the first member, above for the second.
    assert disagreements(torch.tensor([[1.0, 2.0], [1.0, 1.0]])).tolist() == [False, False]
    assert disagreements(torch.tensor([[1.0, 2.0]])).tolist() == [False]
