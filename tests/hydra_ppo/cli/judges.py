"""Judges for the tests of `hydra-ppo reward-eval`."""

from __future__ import annotations

from tests.training import WORDS


def low_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the share of words w0 to w7 in each response."""
    low = set(WORDS[:8])
    return [sum(word in low for word in text.split()) / max(1, len(text.split())) for text in responses]


def wants_a_column(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Return a number; the rows must have an answer."""
    return [0.0 for _ in responses]
