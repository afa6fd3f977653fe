"""Run folders for the tests of pages: written by the program's own `Run`, with texts that want to be more than text."""

from __future__ import annotations

from pathlib import Path

from hydra_ppo.config.settings import DataSettings, ModelSettings, PPOConfig, RunSettings
from hydra_ppo.runs.run import Run

HOSTILE = (
    '</script><script>window.hacked="script"</script>',
    '<img src=x onerror="window.hacked=1">',
    "\" onmouseover='window.hacked=2' x=\"",
    "<svg onload=window.hacked=3><style>body{display:none}</style>",
    "<iframe src=https://example.org></iframe>&lt;b&gt;",
    "\u202egnihton\u202c \x00\x1b[31m \u2028 \ud800 ]]> <!--",
)
"""Texts as a model may write them."""


def write_run(folder: Path, steps: int = 12, lift: float = 1.0, finished: bool = True, **settings: object) -> Path:
    """Write a run of PPO whose scores rise by `lift`, with an alarm, samples before and after, and a card of 24 GiB."""
    config = PPOConfig(
        model=ModelSettings(name_or_path=str(folder.parent / "base")),
        data=DataSettings(train="prompts.jsonl"),
        run=RunSettings(output=str(folder), progress=False),
        steps=steps,
        **settings,  # type: ignore[arg-type]
    )
    with Run.create(config.run, config, "ppo") as run:
        run.on_device('An "A10"', 24 * 2**30)
        run.log(0, {"eval/scores": 0.5, "eval/kl": 0.0, "eval/independent": 1.0})
        for row, text in enumerate(HOSTILE):
            run.samples(0, [{"held_out": True, "prompt": f"prompt {row} {text}", "response": " plain tea", "score": 0.25}])
        for step in range(1, steps + 1):
            share = step / steps
            run.log(
                step,
                {
                    "objective/scores": 0.5 + lift * share,
                    "objective/kl": 20 * share,
                    "rollout/response_length": 30 + step,
                    "policy/entropy": 2 - share,
                    "value/explained_variance": float("nan") if step == 1 else share,
                    "policy/clip_frac": 0.1,
                    "value/clip_frac": 0.2,
                    "eval/scores": 0.5 + lift * share if step % 4 == 0 else None,
                    "eval/kl": 18 * share if step % 4 == 0 else None,
                    "eval/independent": 1 - share if step % 4 == 0 else None,
                    "lr": 1e-5,
                    "memory/rollout_peak_bytes": 6 * 2**30,
                    "memory/update-actor_peak_bytes": 18 * 2**30 + step,
                },
            )
        run.alarm(8, "over_optimisation", f"the score rose {HOSTILE[1]}; raise kl.coef", {"p": 0.01})
        for row, text in enumerate(HOSTILE):
            response = " plain tea" if row == 2 else f" answer {row} {text}"
            run.samples(
                steps,
                [{"held_out": True, "prompt": f"prompt {row} {text}", "response": response, "score": 0.25 + lift * row}],
            )
        if finished:
            run.finish({"eval_scores_before": 0.5, "eval_scores_after": 0.5 + lift, "eval_scores_gain_se": 0.125})
    return folder
