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
