"""How far a reward model can be believed: accuracy on pairs, what its scores owe to length, what the best of n gains."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pair_accuracy(margins: Sequence[float]) -> tuple[float, float]:
    """Return the share of pairs whose better answer scores higher, and its standard error, sqrt(a (1 - a) / n).

    Args:
        margins: score of the better answer less that of the worse, a number for each pair; 0, a tie, is half right.

    Raises:
        ValueError: where there are none.
    """
    if not margins:
        raise ValueError("margins is empty; give at least one pair.")
    share = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)
    return share, math.sqrt(share * (1 - share) / len(margins))


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
