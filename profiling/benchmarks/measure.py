"""Times and weighs the parts: ``pytest profiling/benchmarks -o python_files='bench_*.py' --benchmark-json BENCH_JSON``.

Every benchmark times named calls and leaves in `extra_info`, by these names, `seconds` (median of one call), and where they
were asked for `peak_bytes` (over what was alive before) and `tokens_per_second`; also `title`, `baseline` (the name that the
others are compared with, or None), `threads` and `torch`. What pytest-benchmark itself prints is one round of all the calls;
``python -m hydra_ppo.profiling.benchmarks.table BENCH_JSON --output OUT_JSON`` shows these.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.runtime.memory import LiveBytes

Call = Callable[[], object]


def measure(
    benchmark: Any,
    title: str,
    calls: Mapping[str, Call],
    *,
    rounds: int,
    repeats: int = 1,
    baseline: str | None = None,
    tokens: int | None = None,
    alive: Iterable[Tensor] | None = None,
) -> None:
    """Run the calls in turn, round by round, and record what they take.

    They take turns because other work on the machine slows it down for seconds at a time: it then hits all of them.

    Args:
        benchmark: pytest-benchmark's fixture.
        title: what the calls do.
        calls: by name. Each runs once before the clock starts.
        rounds: times that every call has its turn.
        repeats: times a call is repeated in its turn, where one is too short for the clock.
        baseline: name of the call that the others are compared with.
        tokens: that one call handles.
        alive: tensors that exist before the calls; None where peaks are not asked for.
    """
    benchmark.extra_info |= {"title": title, "baseline": baseline}
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if alive is not None:
        alive = list(alive)
        benchmark.extra_info["peak_bytes"] = {name: peak_bytes(call, alive) for name, call in calls.items()}
    else:
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def one_round() -> None:
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - begun) / repeats)

    benchmark.pedantic(one_round, rounds=rounds)
    medians = {name: median(found) for name, found in seconds.items()}
    benchmark.extra_info["seconds"] = medians
    if tokens is not None:
        benchmark.extra_info["tokens_per_second"] = {name: tokens / found for name, found in medians.items()}


def peak_bytes(call: Call, alive: Iterable[Tensor]) -> int:
    """Return the most bytes of tensors that live at once during `call`, those of `alive` left out.

    Temporaries inside a single kernel are not seen.
    """
    gc.collect()
    live = LiveBytes(alive)
    before = live.bytes
    with live:
        call()
    return live.peak - before
