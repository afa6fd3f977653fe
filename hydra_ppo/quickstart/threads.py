"""How many threads a model this small runs fastest with: found out, since two can be slower than one.

On 2 cores of an AMD EPYC a step of the quickstart's SFT took 0.14 s with one thread and 0.22 s with two: each product is so
short that threads mostly wait for each other. On another machine it may be the other way round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig

ROUNDS = 5
WORTH = 1.3
"""How much faster more threads must be."""
ROWS, TOKENS = 32, 24
"""Of a step of SFT here, about."""


def choose_threads(config: LlamaConfig) -> str | None:
    """Let torch use as many threads as run a model of this shape fastest, and return a line that says so.

    Returns:
        None where there is nothing to choose: a GPU, one core, or a number that the user has set (`OMP_NUM_THREADS`).
    """
    counts = candidates(torch.get_num_threads())
    if torch.cuda.is_available() or len(counts) < 2 or "OMP_NUM_THREADS" in os.environ:
        return None
    seconds = medians(counts, _passes(config), torch.set_num_threads)
    best = fewest(seconds)
    torch.set_num_threads(best)
    said = ", ".join(f"{1000 * seconds[count]:.0f} ms with {count}" for count in counts)
    return f"{best} {'thread' if best == 1 else 'threads'}: a pass takes {said}"


def fewest(seconds: Mapping[int, float]) -> int:
    """Return the smallest count whose time is within `WORTH` of the best: threads that wait for each other suffer most where
    another program wants a core. A run with two took ten times as long while one was taken."""
    return min(count for count, time in seconds.items() if time <= WORTH * min(seconds.values()))


def candidates(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the most itself."""
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def medians(
    counts: Sequence[int],
    run: Callable[[], object],
    use: Callable[[int], object],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return the median time of `run` with each count, in rounds in which they take turns; the first round is left out."""
    found: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(ROUNDS + 1):
        for count in counts:
            use(count)
            begun = clock()
            run()
            if number:
                found[count].append(clock() - begun)
    return {count: median(times) for count, times in found.items()}


def _passes(config: LlamaConfig) -> Callable[[], None]:
    """Return a forward and backward pass of a model of this shape; it draws from no random source that is used later."""
    from transformers import AutoModelForCausalLM

    state = torch.get_rng_state()
    model = AutoModelForCausalLM.from_config(config)
    torch.set_rng_state(state)
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % config.vocab_size

    def run() -> None:
        model(input_ids=ids).logits.float().logsumexp(dim=-1).sum().backward()
        model.zero_grad(set_to_none=True)

    return run
