from __future__ import annotations

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.parallel.dealing import check_divides, deal, deal_in_rounds


def test_two_pieces_go_to_two_in_order():
    assert deal([5, 5], 2) == [[0], [1]]
    assert deal([7, 3], 2) == [[0], [1]]
    assert deal([3, 7], 2) == [[1], [0]]  # the larger one first


def test_nobody_has_much_more_than_others():
    """By hand: 9, 8, 7 to the three, then 6 to who has 7, 5 to who has 8, 4 to who has 9."""
    hands = deal([9, 8, 7, 6, 5, 4], 3)
    assert hands == [[0, 5], [1, 4], [2, 3]]
    assert sorted(hands[0] + hands[1] + hands[2]) == list(range(6))


def test_pieces_without_cost_are_spread_too():
    assert deal([0, 0, 0], 3) == [[0], [1], [2]]


def test_one_process_does_all():
    assert deal([1, 2, 3], 1) == [[0, 1, 2]]
    assert deal([], 2) == [[], []]


def test_rounds_are_as_many_for_everybody():
    """Alike in size within a round, and a process that has none in the last."""
    assert deal_in_rounds([1, 9, 2, 8, 3], 2) == [[1, 4, 0], [3, 2, None]]
    assert deal_in_rounds([], 2) == [[], []]


def test_what_does_not_divide_is_refused_in_a_line():
    check_divides(4, minibatch_size=8, rollout__batch_size=64)
    with pytest.raises(
        ConfigError, match=r"WORLD_SIZE=3 does not divide rollout.batch_size=8, .* start 1, 2, 4 or 8 of them, or"
    ):
        check_divides(3, rollout__batch_size=8)
    with pytest.raises(ConfigError, match="start 1 of them"):
        check_divides(2, minibatch_size=1)
