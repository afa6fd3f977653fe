"""Reward functions of the fault tests."""

from __future__ import annotations

import math
import random
import time

import numpy
import torch

from tests.training import count_low_tokens


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """A judge that draws from every global source of randomness."""
    found = count_low_tokens(prompts, responses)
    return [value + 0.1 * random.random() + 0.1 * numpy.random.rand() + 0.1 * torch.rand(()).item() for value in found]


calls = {"count": 0}
"""Calls so far in this process; a test sets it to 0. With held-out prompts the first call is their evaluation."""

DATA = {"path": ""}
"""File that `spoil_data` changes."""


def _third() -> bool:
    calls["count"] += 1
    return calls["count"] == 3


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    """Fails in the second step."""
    if _third():
        raise OSError("the judge is down")
    return noisy(prompts, responses)


def sleeps(prompts: list[str], responses: list[str]) -> list[float]:
    """Hangs in the second step, as a request without a time limit does."""
    if _third():
        time.sleep(3600)
    return noisy(prompts, responses)


def spins(prompts: list[str], responses: list[str]) -> list[float]:
    """Hangs in the second step, computing."""
    if _third():
        while True:
            pass
    return noisy(prompts, responses)


def too_few(prompts: list[str], responses: list[str]) -> list[float]:
    """Leaves one response out in the second step."""
    found = noisy(prompts, responses)
    return found[1:] if _third() else found


def nothing(prompts: list[str], responses: list[str]) -> list[float] | None:
    """Returns None in the second step."""
    found = noisy(prompts, responses)
    return None if _third() else found


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    """Returns NaN in the second step."""
    found = noisy(prompts, responses)
    return [math.nan, *found[1:]] if _third() else found


def spoil_data(prompts: list[str], responses: list[str]) -> list[float]:
    """Changes the data file during the second step."""
    if _third():
        with open(DATA["path"], "a") as file:
            file.write('{"prompt": "w1 w2", "chosen": "w3", "rejected": "w9"}\n{"half')
    return noisy(prompts, responses)


def hangs(prompts: list[str], responses: list[str]) -> list[float]:
    """Never returns."""
    time.sleep(3600)
    return []
