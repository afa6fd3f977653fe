"""The speed of each phase of a step, without the tracker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from hydra_ppo.profiling.measuring.clock import PhaseClock
from hydra_ppo.profiling.subjects import subjects
from hydra_ppo.profiling.subjects.subjects import Builder
from hydra_ppo.profiling.validate.parts import require, shortened
from hydra_ppo.profiling.workload import Workload

WARM_UP_TOKENS = 8
"""Length of the responses of steps that are not counted."""


def free(device: torch.device) -> int:
    """Give back what nothing refers to any more; return the bytes still allocated on the device, 0 on a CPU."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


@contextmanager
def weights_made_on(device: torch.device) -> Iterator[None]:
    """Draw the random weights of models under a `Builder` on the device: eight billion of them take minutes on a host."""
    build = subjects.base_from_config

    def on_device(*args: Any, **options: Any) -> Any:
        with device:
            return build(*args, **options)

    with patch.object(subjects, "base_from_config", on_device):
        yield


def check_speed(workload: Workload, config: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time the phases of one step, without the tracker and after two short steps that nobody times.

    Rewards and advantages count for the phase `score`. `tokens` are those of prompts and responses, `response_tokens` those
    of responses alone, the same in all phases.

    Args and raises: as `check_memory`.
    """
    require(workload.quantization)
    with weights_made_on(device):
        model = Builder(workload, config, "hydra", "ppo", device, False).models()

    def step(sizes: Workload) -> dict[str, float]:
        clock = PhaseClock(device)
        subject = Builder(sizes, config, "hydra", "ppo", device, False).subject(model, clock)
        subject.warm_up()
        subject.step()
        clock("end")
        return clock.seconds

    few = replace(workload, response=min(WARM_UP_TOKENS, workload.response))
    step(few)
    decode = step(few)["rollout"] / few.response
    chosen = shortened(workload, seconds, decode)
    found = step(chosen)
    total = sum(found.values())
    response_tokens = chosen.rollout_batch * chosen.response
    tokens = response_tokens + chosen.rollout_batch * chosen.prompt

    def rates(time: float) -> dict[str, float]:
        return {
            "seconds": time,
            "response_tokens_per_second": response_tokens / time,
            "tokens_per_second": tokens / time,
        }

    return {
        "settings": chosen.settings(),
        "response_asked_for": workload.response,
        "phases": {phase: rates(time) for phase, time in found.items()},
        "step": rates(total),
        "responses_per_second": chosen.rollout_batch / total,
        "passed": True,
        "summary": f"{chosen.rollout_batch / total:.2f} responses/s of {chosen.response} tokens; response tokens/s: "
        + ", ".join(f"{phase} {response_tokens / time:,.0f}" for phase, time in found.items()),
    }
