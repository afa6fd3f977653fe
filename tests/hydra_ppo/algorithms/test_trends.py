"""Trends of short series: sums and variances by hand, exact p by counting orders, and scipy's where it is installed."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hydra_ppo.algorithms import trends
from hydra_ppo.algorithms.trends import mann_kendall, p_below, paired, sen_slope


def test_four_values_that_rise_by_hand():
    found = mann_kendall([1.0, 2.0, 3.0, 4.0])
    assert found.s == 6
    assert found.variance == pytest.approx(4 * 3 * 13 / 18)
    assert found.p_up == pytest.approx(1 / 24)  # one order of 24
    assert found.p_down == 1.0
    assert found.p == pytest.approx(1 / 12)


def test_one_pair_out_of_order_by_hand():
    """2 1 3 4: five pairs rise, one falls; of 24 orders 1 has no falling pair and 3 have one."""
    found = mann_kendall([2.0, 1.0, 3.0, 4.0])
    assert found.s == 4
    assert found.p_up == pytest.approx(4 / 24)
    assert found.p_down == pytest.approx(23 / 24)


def test_ties_by_hand():
    """1 2 2 3: five pairs rise, one is a tie. Variance (4*3*13 - 2*1*9) / 18 = 138 / 18, z = 4 / 2.7689."""
    found = mann_kendall([1.0, 2.0, 2.0, 3.0])
    assert found.s == 5
    assert found.variance == pytest.approx(138 / 18)
    assert found.p_up == pytest.approx(0.5 * math.erfc(4 / math.sqrt(138 / 18) / math.sqrt(2)))


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]], ids=str)
def test_what_has_no_trend_at_all(values):
    assert mann_kendall(values)[:2] == (0, 0.0)
    assert mann_kendall(values).p == mann_kendall(values).p_up == mann_kendall(values).p_down == 1.0


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_exact_p_counts_orders(n):
    sums = [mann_kendall(order).s for order in itertools.permutations(range(n))]
    for s in set(sums):
        order = next(order for order in itertools.permutations(range(n)) if mann_kendall(order).s == s)
        assert mann_kendall(order).p_up == pytest.approx(sum(other >= s for other in sums) / len(sums))
        assert mann_kendall(order).p_down == pytest.approx(sum(other <= s for other in sums) / len(sums))


def test_scipy_says_the_same():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    for n in (4, 7, 10, 25):
        values = [rng.random() + 0.1 * i for i in range(n)]
        found = mann_kendall(values)
        theirs = stats.kendalltau(range(n), values, method="exact")
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert found.s == pytest.approx(theirs.statistic * n * (n - 1) / 2)
        assert sen_slope(range(n), values) == pytest.approx(stats.theilslopes(values, range(n)).slope)


def test_the_normal_distribution_is_close_to_what_is_counted_out(monkeypatch):
    rng = random.Random(1)
    values = [rng.random() + 0.01 * i for i in range(40)]
    exact = mann_kendall(values)
    monkeypatch.setattr(trends, "EXACT", 0)
    normal = mann_kendall(values)
    assert normal[:2] == exact[:2]
    assert normal.p_up != exact.p_up
    assert normal.p_up == pytest.approx(exact.p_up, rel=0.05)
    assert normal.p_down == pytest.approx(exact.p_down, rel=0.05)


def test_sen_slope_by_hand():
    assert sen_slope([0, 2, 4], [1.0, 2.0, 9.0]) == pytest.approx(2.0)  # slopes 0.5, 2, 3.5
    assert sen_slope([0], [1.0]) == 0.0


def test_paired_by_hand():
    """Gains 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt(3)."""
    assert paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert paired([0.0], [1.0]) == (1.0, 0.0)
    assert p_below(-1.6448536, 1.0) == pytest.approx(0.05, abs=1e-6)
    assert (p_below(-1.0, 0.0), p_below(0.0, 0.0), p_below(1.0, 0.0)) == (0.0, 1.0, 1.0)
