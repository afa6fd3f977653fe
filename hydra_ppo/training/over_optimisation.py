"""Whether the score that training raises has come apart from an evaluator that training never sees.

Every evaluation samples the same prompts with the same random numbers, so two of them are compared prompt by prompt, which
takes out how hard the prompts are. Three signs, each by a test at the same significance; any of them is enough:

fall    the evaluator is significantly below its best evaluation so far, and the score is not significantly below what it
        was then: it does not show what happened
lag     halves of a span, 2 to `window` evaluations long: the score rose significantly from the earlier to the later one, the
        evaluator did not rise, and it gains significantly less for a point of the score than it did before the span
trend   the diagnostic that Lambert and Calandra 2023 (arXiv 2311.00168) lead to: over a whole window the score has a
        significant upward trend, and the evaluator's is significantly downward, or its slope was not above 0 in half a window
        of evaluations in a row

A fall only shows once there is something to fall from, and a slope that is not above 0 proves nothing by itself; the lag is
a test of means of several evaluations, so it is the first to see an evaluator that has stopped.
Every evaluation is a new look, so p is multiplied by the number of looks so far; that of the lag besides by the spans
that are tried, that of the fall by the evaluations that the best was chosen from (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_ppo.algorithms.trends import mann_kendall, p_below, paired, sen_slope


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, prompt by prompt.

    Attributes:
        step: of the run.
        proxy: scores of the sources that training raises.
        independent: what the evaluators say.
    """

    step: int
    proxy: list[float]
    independent: list[float]

    @property
    def means(self) -> tuple[float, float]:
        """Means of score and evaluator."""
        return _mean(self.proxy), _mean(self.independent)


@dataclass(frozen=True)
class Sign:
    """One sign that was found.

    Attributes:
        kind: trend, fall or lag.
        since, best: steps of the evaluation that it is measured from, and of the evaluator's best.
        proxy, independent: means then and now.
        p: of what is said of the evaluator; None where its slope alone says it.
    """

    kind: str
    since: int
    best: int
    proxy: tuple[float, float]
    independent: tuple[float, float]
    p: float | None


def find_sign(
    first: Evaluation, best: Evaluation, tried: int, recent: Sequence[Evaluation], window: int, flat: int, significance: float
) -> Sign | None:
    """Return the first sign of those that are found, in the order fall, lag, trend; None where there is none.

    Args:
        first: of before training.
        best: the earlier evaluation with the highest mean of the evaluator.
        tried: earlier evaluations.
        recent: the last ones, the newest last; at most as many as the window.
        window: evaluations of a trend.
        flat: evaluations in a row, the newest one included, at which `stands_still` held.
        significance: largest p that counts.
    """
    found = (
        _fall(best, tried, recent, significance)
        or _lag(first, tried, recent, significance)
        or _trend(tried, recent, window, flat, significance)
    )
    if found is None:
        return None
    kind, since, p = found
    (proxy, independent), (now, judged) = since.means, recent[-1].means
    top = max([best, *recent], key=lambda one: one.means[1])
    return Sign(kind, since.step, top.step, (proxy, now), (independent, judged), p)


def stands_still(recent: Sequence[Evaluation], window: int, significance: float) -> bool:
    """Say whether over a whole window the score rises significantly and the evaluator's slope is not above 0."""
    if len(recent) < window:
        return False
    proxy, independent = zip(*(found.means for found in recent), strict=True)
    return mann_kendall(proxy).p_up <= significance and sen_slope([found.step for found in recent], independent) <= 0


Found = tuple[str, Evaluation, float | None]


def _fall(best: Evaluation, tried: int, recent: Sequence[Evaluation], significance: float) -> Found | None:
    now = recent[-1]
    if best.step >= now.step:
        return None
    p = p_below(*paired(best.independent, now.independent)) * tried * (tried + 1)
    # A score that fell too shows what happened by itself; one that is at its ceiling does not rise any more, and hides it.
    hidden = p_below(*paired(best.proxy, now.proxy)) > significance
    return ("fall", best, min(p, 1.0)) if p <= significance and hidden else None


def _lag(first: Evaluation, tried: int, recent: Sequence[Evaluation], significance: float) -> Found | None:
    spans = range(1, len(recent) // 2 + 1)
    looks = len(spans) * (tried + 1)
    for half in reversed(spans):
        early, late = _pooled(recent[-2 * half : -half]), _pooled(recent[-half:])
        gain, error = paired(early.proxy, late.proxy)
        if gain <= 0 or p_below(-gain, error) * looks > significance or paired(early.independent, late.independent)[0] > 0:
            continue
        before = paired(first.proxy, early.proxy)[0]
        if before <= 0:
            continue
        # What the evaluator gains for a point of the score, late less early, times both gains of the score.
        rows = zip(first.independent, early.independent, late.independent, strict=True)
        slower = [(c - b) * before - (b - a) * gain for a, b, c in rows]
        p = p_below(*paired([0.0] * len(slower), slower)) * looks
        if p <= significance:
            return "lag", recent[-2 * half], min(p, 1.0)
    return None


def _trend(tried: int, recent: Sequence[Evaluation], window: int, flat: int, significance: float) -> Found | None:
    if len(recent) < window:
        return None
    if flat >= window // 2:
        return "trend", recent[0], None
    proxy, independent = zip(*(found.means for found in recent), strict=True)
    down = mann_kendall(independent).p_down * (tried + 1)
    rises = mann_kendall(proxy).p_up <= significance
    return ("trend", recent[0], down) if rises and down <= significance else None


def _pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the mean of several evaluations, prompt by prompt."""
    columns = [zip(*(getattr(found, name) for found in evaluations), strict=True) for name in ("proxy", "independent")]
    proxy, independent = ([_mean(values) for values in column] for column in columns)
    return Evaluation(evaluations[0].step, proxy, independent)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
