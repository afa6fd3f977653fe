"""Accuracy, length and the best of n, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.algorithms.reliability import best_of_n_gain, length_r2, mean_and_error, pair_accuracy


def test_accuracy_with_its_error():
    share, error = pair_accuracy([1.0, 2.0, -1.0, 0.5])
    assert share == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert pair_accuracy([0.0])[0] == 0.5
    assert pair_accuracy([0.0, 1.0, -1.0, -2.0])[0] == 0.375  # a tie is half right


def test_length_explains_what_it_was_made_of():
    lengths = [1, 2, 4, 8]
    assert length_r2([3 + 2 * math.log(n) for n in lengths], lengths) == pytest.approx(1.0)
    # x = 0, 1, 2, 3 times log 2, y = 0, 1, 0, 1: r^2 = 1/5
    assert length_r2([0.0, 1.0, 0.0, 1.0], lengths) == pytest.approx(0.2)
    assert length_r2([1.0, 1.0], [3, 5]) is None
    assert length_r2([1.0, 2.0], [3, 3]) is None


def test_length_is_the_squared_correlation():
    torch.manual_seed(0)
    lengths = torch.randint(1, 50, (40,))
    scores = torch.randn(40) + 0.5 * lengths.log()
    expected = torch.corrcoef(torch.stack([scores.double(), lengths.double().log()]))[0, 1] ** 2
    assert length_r2(scores.tolist(), lengths.tolist()) == pytest.approx(expected.item(), abs=1e-6)


def test_best_of_n():
    # gains 3 - 2 and 5 - 2
    assert best_of_n_gain([[1.0, 2.0, 3.0], [1.0, 5.0, 0.0]]) == pytest.approx((2.0, math.sqrt(2.0 / 2)))
    assert best_of_n_gain([[4.0]]) == (0.0, 0.0)
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))


def test_nothing_is_refused():
    for call in (lambda: pair_accuracy([]), lambda: best_of_n_gain([[]])):
        with pytest.raises(ValueError, match="is empty"):
            call()
    with pytest.raises(ValueError, match="as many of each"):
        length_r2([1.0], [1, 2])
