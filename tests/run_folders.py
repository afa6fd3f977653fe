"""Run folders as runs leave them, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_ppo.runs.run import Run
from tests.hydra_ppo.runs.test_run import make_config

HOSTILE = '</script><img src=x onerror="document.title=1">&lt;b&gt;\'"\u202e\x1b[2J'
"""What a model may say: a script's end, a picture that runs code, escapes, quotes, text turned round, a terminal's code."""


def logged(step: int) -> dict[str, float | None]:
    """Return metrics of a step as PPO logs them."""
    return {
        "objective/scores": 0.1 * step,
        "objective/kl": 0.5 * step,
        "rollout/response_length": 20.0 + step,
        "policy/entropy": 2.0 - 0.01 * step,
        "policy/clip_frac": 0.05,
        "value/clip_frac": 0.1,
        "value/explained_variance": None if step < 3 else 0.5,
        "memory/rollout_peak_bytes": 3 * 2**20 + step,
        "memory/update-actor_peak_bytes": 2 * 2**20,
    }


def write_run(
    folder: Path,
    steps: int = 12,
    samples: Sequence[Mapping[str, Any]] | None = None,
    device: tuple[str, int | None] = ("cpu", None),
    finished: bool = True,
    **settings: Any,
) -> Path:
    """Write a run of PPO with evaluations before and after, an alarm and samples, and return its folder."""
    config = make_config(folder, **settings)
    run = Run.create(config.run, config, "ppo")
    run.on_device(*device)
    run.log(0, {"eval/scores": 0.25, "eval/kl": 0.0})
    before = [{"held_out": True, "prompt": f"prompt {i}", "response": f"before {i}", "score": 0.1 * i} for i in range(5)]
    after = [
        row | {"response": row["response"] if row["prompt"] == "prompt 4" else f"after {i} {HOSTILE}", "score": 1.0 - i}
        for i, row in enumerate(before)
    ]
    if samples is None:
        run.samples(0, before)
    for step in range(1, steps + 1):
        last = step == steps
        run.log(step, logged(step) | ({"eval/scores": 1.25, "eval/kl": 6.0} if last else {}))
    if samples is None:
        run.samples(steps, after)
    else:
        run.samples(steps, list(samples))
    run.alarm(7, "kl_budget", "the KL is 3.5 nats; raise kl.coef", {"kl": 3.5})
    if finished:
        run.finish({"steps": steps, "eval_scores_gain_se": 0.125})
    else:
        run._close("interrupted", KeyboardInterrupt())
    return folder
