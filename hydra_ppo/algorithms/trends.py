"""Whether a short series of numbers goes up or down: a test of ranks, and a slope that outliers do not move.

Plain numbers of the host, not tensors: they come from metrics, which were read already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist, median
from typing import NamedTuple

EXACT = 40
"""Most values whose exact distribution is counted out: 40 of them have 781 possible sums."""


class Trend(NamedTuple):
    """What the Mann-Kendall test says of a series.

    Attributes:
        s: pairs that rise less pairs that fall.
        variance: of s without a trend, corrected for ties.
        p_up, p_down: probability of an s as large, or as small, where there is no trend.
    """

    s: int
    variance: float
    p_up: float
    p_down: float

    @property
    def p(self) -> float:
        """Two-sided."""
        return min(1.0, 2 * min(self.p_up, self.p_down))


def mann_kendall(values: Sequence[float]) -> Trend:
    """Test a series for a monotonic trend.

    S = sum over i < j of sign(x_j - x_i);  Var(S) = (n (n - 1) (2n + 5) - sum over ties t (t - 1) (2t + 5)) / 18.
    Without ties, and up to `EXACT` values, p is counted out over all orders; else S moved by 1 towards 0, over the root of its
    variance, is held against the normal distribution.
    Source: Mann 1945 (Econometrica 13); Kendall 1975 (Rank Correlation Methods), for ties and the exact distribution.

    Args:
        values: in order of time; of fewer than two every p is 1.
    """
    n = len(values)
    s = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])
    ties = [count for count in Counter(values).values() if count > 1]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    if variance == 0:
        return Trend(s, 0.0, 1.0, 1.0)
    if not ties and n <= EXACT:
        return Trend(s, variance, _tail(n, s), _tail(n, -s))
    return Trend(s, variance, _normal_tail(s, variance), _normal_tail(-s, variance))


def _normal_tail(s: int, variance: float) -> float:
    return NormalDist().cdf(-(s - 1) / math.sqrt(variance))


def _tail(n: int, s: int) -> float:
    """Return the share of the orders of n different values whose sum is at least s, n at least 2."""
    counts = [1]  # orders by the number of pairs that fall, for 1, 2, ... n values
    for size in range(2, n + 1):
        grown = [0] * (len(counts) + size - 1)
        for falls, count in enumerate(counts):
            for more in range(size):
                grown[falls + more] += count
        counts = grown
    most = (n * (n - 1) // 2 - s) // 2  # s = pairs - 2 * falls
    return sum(counts[: most + 1]) / math.factorial(n) if most >= 0 else 0.0


def sen_slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the median of the slopes of all pairs; 0 of fewer than two values.

    Source: Sen 1968 (J. Amer. Stat. Assoc. 63), after Theil 1950.

    Args:
        times: of each value, all different.
    """
    points = list(zip(times, values, strict=True))
    slopes = [(y - x) / (u - t) for i, (t, x) in enumerate(points) for u, y in points[i + 1 :]]
    return median(slopes) if slopes else 0.0


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean of after - before, row by row, and its standard error.

    The standard error of one row, or of rows that all change alike, is 0.

    Args:
        before, after: the same rows; at least one.
    """
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = math.fsum(gains) / len(gains)
    variance = math.fsum((gain - mean) ** 2 for gain in gains) / max(len(gains) - 1, 1)
    return mean, math.sqrt(variance / len(gains))


def p_below(mean: float, error: float) -> float:
    """Return the one-sided p of a mean that is as low or lower where the truth is 0; of no error 0 below 0, else 1."""
    if error <= 0:
        return 0.0 if mean < 0 else 1.0
    return NormalDist().cdf(mean / error)
