"""How fast this machine's CPU multiplies, by the kernels that a run has to choose from."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from hydra_ppo.compute.products import linear

ROWS, INPUTS, OUTPUTS = 384, 1024, 3072
"""Of the product that is timed: a micro-batch, and a layer of a model with less than a billion parameters."""
ROUNDS = 5

FP32, FP32_OURS, BF16 = "fp32 by torch", "fp32 as here", "bf16"


@torch.no_grad()
def rates(rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return multiply-adds per second by kernel, from the median of rounds in which they take turns; about half a second.

    `FP32_OURS` is what products with frozen weights go through here (`products.linear`), `FP32` what torch takes by itself.
    With as many threads as torch has. The first round is left out.
    """
    x, weight = torch.full((ROWS, INPUTS), 0.5), torch.full((OUTPUTS, INPUTS), 0.5)
    half = x.bfloat16(), weight.bfloat16()
    kernels: dict[str, Callable[[], object]] = {
        FP32: lambda: torch.nn.functional.linear(x, weight),
        FP32_OURS: lambda: linear(x, weight),
        BF16: lambda: linear(*half),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for counted in range(rounds + 1):
        for name, run in kernels.items():
            begun = clock()
            run()
            taken = clock() - begun
            seconds[name] += [taken] if counted else []
    return {name: ROWS * INPUTS * OUTPUTS / median(found) for name, found in seconds.items()}
