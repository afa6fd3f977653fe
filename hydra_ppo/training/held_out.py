"""What an evaluation finds on held-out prompts, and how two of them compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra_ppo.algorithms.trends import paired
from hydra_ppo.experience import ScoredExperience
from hydra_ppo.rewards.scorer import Scores
from hydra_ppo.training.metrics import Metrics
from hydra_ppo.training.ppo_metrics import reward_metrics, rollout_metrics
from hydra_ppo.training.response_metrics import text_metrics


def evaluation(
    experience: ScoredExperience,
    scores: Scores,
    judges: Scores | None,
    ended: Sequence[bool],
    texts: Sequence[str],
    eos_ids: Sequence[int],
    most: int,
) -> dict[str, Any]:
    """Return what an evaluation finds.

    Args:
        scores: what the sources of training say of the answers.
        judges: what `eval_rewards` say of them; None without any.
        ended: of each answer, whether it came to an end token or a stop string.
        texts: the answers.
        eos_ids: tokens that end an answer.
        most: `rollout.max_new_tokens`.

    Returns:
        eval/scores (mean), eval/kl (nats per response; its root as eval/kl_sqrt), eval/response_length, eval/eos_rate,
        eval/truncated, eval/repeated_4grams, eval/distinct_2, eval/length_r2, each reward source as eval/reward/name; and
        `scores`, `responses` row by row. With evaluators what `judged` returns.
    """
    raw = scores.total
    found = rollout_metrics(experience, raw, raw, 0.0, eos_ids)
    shown = text_metrics(experience, raw, ended, eos_ids, most)
    return {
        "eval/scores": found["objective/scores"],
        "eval/kl": found["objective/kl"],
        "eval/kl_sqrt": found["objective/kl_sqrt"],
        "eval/response_length": found["rollout/response_length"],
        "eval/eos_rate": found["rollout/eos_rate"],
        "eval/repeated_4grams": found["rollout/repeated_4grams"],
        **{f"eval/{name}": value for name, value in shown.items()},
        **reward_metrics(scores.parts, "eval/"),
        **({} if judges is None else judged(judges)),
        "scores": raw,
        "responses": list(texts),
    }


def judged(scores: Scores) -> dict[str, Any]:
    """Return what evaluators say: means as eval/independent and eval/independent/NAME, and both row by row.

    Args:
        scores: of the held-out responses; the total is the weighted sum of `eval_rewards`.
    """
    means = reward_metrics(scores.parts, "eval/")
    return {
        "eval/independent": math.fsum(scores.total) / len(scores.total),
        **{f"eval/independent/{name.removeprefix('eval/reward/')}": value for name, value in means.items()},
        "independent": list(scores.total),
        "independent_parts": {name: list(values) for name, values in scores.parts.items()},
    }


def numbers_of(found: Mapping[str, Any]) -> Metrics:
    """Return what of an evaluation is a metric, and not a list by row."""
    return {name: value for name, value in found.items() if name.startswith("eval/")}


def held_out_samples(found: Mapping[str, Any], prompts: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Return the first answers of an evaluation with what training says of them, and evaluators where there are any."""
    answers = list(zip(prompts, found.get("responses", ()), found.get("scores", ()), strict=False))[:most]
    rows = [{"held_out": True, "prompt": prompt, "response": text, "score": score} for prompt, text, score in answers]
    if "independent" not in found:
        return rows
    parts = found["independent_parts"]
    return [
        own | {"independent": found["independent"][row], "judges": {name: values[row] for name, values in parts.items()}}
        for row, own in enumerate(rows)
    ]


def compare_judged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what evaluators said before and after, the gain and its standard error, prompt by prompt; {} without evaluators.

    Returns:
        eval_independent_before, _after, _gain and _gain_se; of several evaluators each one's as eval_independent_by_name.
    """
    if "independent" not in before or "independent" not in after:
        return {}
    one = _compared(before["independent"], after["independent"])
    found: dict[str, Any] = {f"eval_independent_{name}": value for name, value in one.items()}
    parts, later = before["independent_parts"], after["independent_parts"]
    if len(parts) > 1:
        found["eval_independent_by_name"] = {name: _compared(parts[name], later[name]) for name in parts if name in later}
    return found


def _compared(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    gain, error = paired(before, after)
    count = len(before)
    return {"before": math.fsum(before) / count, "after": math.fsum(after) / count, "gain": gain, "gain_se": error}
