"""How far a reward model can be believed: accuracy on pairs, calibration, and what its scores owe to length."""

from __future__ import annotations

import math
from collections.abc import Sequence

BINS = 10


def pair_accuracy(margins: Sequence[float]) -> tuple[float, float]:
    """Return the share of pairs whose better answer scores higher, and its standard error, sqrt(a (1 - a) / n).

    Args:
        margins: score of the better answer less that of the worse, a number for each pair; 0 counts as wrong.

    Raises:
        ValueError: where there are none.
    """
    if not margins:
        raise ValueError("margins is empty; give at least one pair.")
    share = sum(margin > 0 for margin in margins) / len(margins)
    return share, math.sqrt(share * (1 - share) / len(margins))


def calibration_error(margins: Sequence[float], bins: int = BINS) -> float:
    """Return the expected calibration error of a Bradley-Terry model on pairs, in [0, 1].

    A pair is foretold with p = sigmoid(|margin|), and is right where the margin is above 0. Pairs are put into equal bins of p
    over [0.5, 1], and ECE = sum over bins of n_b / n * |mean right - mean p| (arXiv 2309.10202; Guo et al. 2017).

    Args:
        margins: score of the better answer less that of the worse.
        bins: of [0.5, 1]; a p on an edge belongs to the upper one, 1 to the last.

    Raises:
        ValueError: where there are none.
    """
    if not margins:
        raise ValueError("margins is empty; give at least one pair.")
    counts, right, foretold = [0] * bins, [0.0] * bins, [0.0] * bins
    for margin in margins:
        p = 1 / (1 + math.exp(-abs(margin)))
        place = min(int((p - 0.5) * 2 * bins), bins - 1)
        counts[place] += 1
        right[place] += margin > 0
        foretold[place] += p
    return sum(abs(hits - ps) for hits, ps, count in zip(right, foretold, counts, strict=True) if count) / len(margins)


def length_r2(scores: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Return R^2 of the least-squares line of scores on log length; None where either does not vary.

    Args:
        scores: of responses.
        lengths: of the same responses, tokens, each at least 1.

    Raises:
        ValueError: where they are not equally many.
    """
    if len(scores) != len(lengths):
        raise ValueError(f"scores are {len(scores)}, lengths {len(lengths)}; give as many of each.")
    logs = [math.log(length) for length in lengths]
    count = max(len(scores), 1)
    mean_score, mean_log = math.fsum(scores) / count, math.fsum(logs) / count
    both = math.fsum((s - mean_score) * (x - mean_log) for s, x in zip(scores, logs, strict=True))
    of_scores = math.fsum((s - mean_score) ** 2 for s in scores)
    of_logs = math.fsum((x - mean_log) ** 2 for x in logs)
    smallest = 1e-12 * count  # what rounding leaves of a constant
    return None if of_scores <= smallest or of_logs <= smallest else min(both**2 / (of_scores * of_logs), 1.0)


def best_of_n_gain(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return how much the best of n answers scores above the mean of the n, over prompts, and its standard error.

    What a policy can gain by this score without leaving what it samples already: the ceiling of a short PPO run.

    Args:
        scores: for each prompt those of its n answers.

    Raises:
        ValueError: where there are none.
    """
    if not scores or not all(scores):
        raise ValueError("scores is empty; give at least one answer to each prompt.")
    return mean_and_error([max(row) - math.fsum(row) / len(row) for row in scores])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, sd / sqrt(n) with the unbiased sd; 0 for a single value."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))
