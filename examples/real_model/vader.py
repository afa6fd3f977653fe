"""A reward that nobody here wrote: VADER's compound score (Hutto and Gilbert 2014), from -1, bleak, to 1, cheerful."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    """Return VADER with its lexicon, which takes a moment to read."""
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """Return how cheerful a text is, from -1 to 1."""
    return float(analyzer().polarity_scores(text)["compound"])


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return twice the compound score of each answer, whatever was asked."""
    return [2 * compound(text) for text in responses]
