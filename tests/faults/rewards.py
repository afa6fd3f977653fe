"""Reward functions of the fault tests."""

from __future__ import annotations

import random

import numpy
import torch

from tests.training import count_low_tokens


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """A judge that draws from every global source of randomness."""
    found = count_low_tokens(prompts, responses)
    return [value + 0.1 * random.random() + 0.1 * numpy.random.rand() + 0.1 * torch.rand(()).item() for value in found]
