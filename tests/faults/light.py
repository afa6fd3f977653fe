"""Reward functions in a module that imports little: each run has a process for it."""

from __future__ import annotations

import random
import time

import numpy

LOW = {f"w{i}" for i in range(8)}


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of words w0 to w7, by a judge that draws from two global sources of randomness."""
    shares = [sum(word in LOW for word in text.split()) / max(1, len(text.split())) for text in responses]
    return [share + 0.1 * random.random() + 0.1 * numpy.random.rand() for share in shares]


def slow(prompts: list[str], responses: list[str]) -> list[float]:
    """`noisy`, and long enough for a signal to come before the end of the run."""
    time.sleep(0.5)
    return noisy(prompts, responses)


def fails(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward function with a fault."""
    raise ValueError("no such judge")


def proxy(prompts: list[str], responses: list[str]) -> list[float]:
    """Pays for a few words, however often they are said: what is easy to game."""
    return [sum(word in LOW for word in text.split()) / 6 for text in responses]


def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """What was meant: many different words, and others than those."""
    return [len(set(text.split()) - LOW) / 6 for text in responses]


def noisy_judge(prompts: list[str], responses: list[str]) -> list[float]:
    """`judge`, drawing from global sources of randomness, which training must not notice."""
    return [value + 0.01 * random.random() + 0.01 * numpy.random.rand() for value in judge(prompts, responses)]


def wants_column(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """A judge that reads a column of the rows."""
    return [float(text == given) for text, given in zip(responses, answer, strict=True)]
