"""Sampling beside transformers' own `generate`: the same base, prompts and lengths, and no adapter for `generate` to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.profiling.measuring.clock import PhaseClock
from hydra_ppo.profiling.subjects.subjects import Builder
from hydra_ppo.profiling.validate.parts import require
from hydra_ppo.profiling.validate.speed import weights_made_on
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.rollout.sampling import sample

ROUNDS = 2


def check_generate(workload: Workload, config: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time our sampling, with the actor's adapter and with merged copies, and `generate` on the base alone, in turn.

    Args and raises: as `memory.check_memory`; the seconds are not looked at, the sizes are small.

    Returns:
        Response tokens per second of each and their ratios to `generate`, of the faster of `ROUNDS` rounds; one before is not
        counted.
    """
    require(workload.quantization)
    with weights_made_on(device):
        model = Builder(workload, config, "hydra", "ppo", device, False).models()
    prompts = [[3 + (row + i) % 50 for i in range(workload.prompt)] for row in range(workload.rollout_batch)]
    rollout = RolloutSettings(batch_size=workload.rollout_batch, max_new_tokens=workload.response)
    generator = torch.Generator(device).manual_seed(0)
    lengths = [workload.response] * workload.rollout_batch

    def ours(settings: RolloutSettings) -> None:
        sample(model, prompts, settings, [config.vocab_size], generator, lengths=lengths)

    inputs = torch.tensor(prompts, device=device)
    exact = {"min_new_tokens": workload.response, "max_new_tokens": workload.response}

    def theirs() -> None:
        with model.role("reference"), torch.no_grad():
            found = model.causal_lm.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, use_cache=True, pad_token_id=0, **exact
            )
        assert found.shape[1] == workload.prompt + workload.response

    ways: dict[str, Callable[[], None]] = {
        "hydra": partial(ours, rollout),
        "merged": partial(ours, replace(rollout, weights="merged-bf16")),
        "generate": theirs,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    model.eval()
    for counted in range(ROUNDS + 1):
        for name, run in ways.items():
            clock = PhaseClock(device)
            clock(name)
            run()
            clock("end")
            times[name] += [clock.seconds[name]] if counted else []
    tokens = workload.rollout_batch * workload.response
    rates = {name: tokens / min(found) for name, found in times.items()}
    ratio, merged = (rates[name] / rates["generate"] for name in ("hydra", "merged"))
    return {
        "settings": workload.settings(),
        "seconds_of_each": times,
        "response_tokens_per_second": rates,
        "ratio": ratio,
        "ratio_merged": merged,
        "passed": True,
        "summary": f"{rates['hydra']:,.0f} response tokens/s, by merged copies {rates['merged']:,.0f}, transformers' generate "
        f"{rates['generate']:,.0f}: {ratio:.2f} and {merged:.2f} times as many",
    }
