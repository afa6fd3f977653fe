"""What a PPO step and a PPO run are measured by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.algorithms.advantages import explained_variance
from hydra_ppo.algorithms.losses import importance_weights, logprob_drift
from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.algorithms.penalties import Estimator, kl_penalty
from hydra_ppo.algorithms.trends import paired
from hydra_ppo.experience import FinishedExperience, ScoredExperience
from hydra_ppo.training.metrics import Metrics

POLICY = (
    *("policy/loss", "policy/approx_kl", "policy/clip_frac", "policy/ratio", "policy/entropy", "policy/grad_norm"),
    "policy/ratio_max",
)
VALUE = ("value/loss", "value/clip_frac", "value/grad_norm")
COMPARED = (
    *("eval_scores_before", "eval_scores_after", "eval_scores_gain_se", "eval_kl"),
    *("eval_repeated_4grams_before", "eval_repeated_4grams_after"),
)


def rollout_metrics(
    experience: ScoredExperience,
    raw: Sequence[float],
    shaped: Sequence[float],
    kl_coef: float,
    eos_ids: Sequence[int],
    importance_cap: float | None = None,
    estimator: Estimator = "k1",
) -> Metrics:
    """Return what the rollout shows, with one wait for the device."""
    rows = len(experience)
    compared = _compared(experience, importance_cap)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum() / rows
    surprise = -experience.old_logprobs.sum() / rows
    value_mean = masked_mean(experience.old_values, experience.response_mask)
    penalty = kl if estimator == "k1" else _penalty(experience, estimator)
    kl_value, entropy, value, paid, *numbers = torch.stack([kl, surprise, value_mean, penalty, *compared.values()]).tolist()
    found = dict(zip(compared, numbers, strict=True))
    mean = sum(raw) / rows
    return {
        "objective/scores": mean,
        "objective/scores_std": math.sqrt(sum((s - mean) ** 2 for s in raw) / rows),
        "objective/rlhf_reward": sum(shaped) / rows - kl_coef * paid,
        "objective/kl": kl_value,
        "objective/kl_sqrt": math.sqrt(max(kl_value, 0.0)),
        "objective/entropy": entropy,
        "value/mean": value,
        "rollout/response_length": sum(experience.response_lengths) / rows,
        "rollout/eos_rate": sum(experience.ended(eos_ids)) / rows,
        "rollout/repeated_4grams": repeated_ngrams(experience.responses(), 4),
        "rollout/logprob_drift": found.get("rollout/drift_max"),  # of all rows; None where nothing was recomputed
        **found,
        **_measured_drift(experience),
    }


def value_metrics(finished: FinishedExperience, has_critic: bool) -> Metrics:
    """Return the share of the returns' variance that the values explain; None of all that is of values without a critic."""
    if not has_critic:
        return {"value/mean": None, "value/explained_variance": None}
    explained = explained_variance(finished.old_values, finished.returns, finished.response_mask)
    return {"value/explained_variance": explained.item()}


def _penalty(experience: ScoredExperience, estimator: Estimator) -> Tensor:
    """Return () the mean penalty of a response, in nats; what is penalised need not be the KL itself."""
    found = kl_penalty(experience.old_logprobs, experience.ref_logprobs, estimator)
    return found.masked_fill(~experience.response_mask, 0.0).sum() / len(experience)


def _compared(experience: ScoredExperience, cap: float | None) -> dict[str, Tensor]:
    """Return () tensors of what sampler and pass say of the same tokens, where all were recomputed; {} elsewhere."""
    sampler, mask = experience.sampler_logprobs, experience.response_mask
    if sampler is None:
        return {}
    mean, largest = logprob_drift(sampler, experience.old_logprobs, mask).unbind()
    apart = experience.old_logprobs - sampler
    # Of what the sampler drew the mean of r - 1 - log r is its KL to the policy, and no term of it is negative.
    kl = masked_mean((apart.expm1() - apart), mask)
    found = {"rollout/drift": mean, "rollout/drift_max": largest, "rollout/sampler_kl": kl}
    if cap is not None:
        weights = importance_weights(experience.old_logprobs, sampler, cap)
        found["rollout/importance_max"] = apart.masked_fill(~mask, -torch.inf).max().exp()  # before the cap
        found["rollout/importance_weight"] = masked_mean(weights, mask)
        found["rollout/importance_truncated"] = masked_mean((weights >= cap).to(weights.dtype), mask)
    return found


def _measured_drift(experience: ScoredExperience) -> Metrics:
    """Return the drift that decided whether to recompute, and whether it did; {} where it was not measured on some rows."""
    if experience.drift is None:
        return {}
    mean, largest = experience.drift
    recomputed = float(experience.sampler_logprobs is not None)
    return {"rollout/drift": mean, "rollout/drift_max": largest, "rollout/recomputed": recomputed}


def reward_metrics(parts: Mapping[str, Sequence[float]], prefix: str = "") -> Metrics:
    """Return the mean of what each reward source says, and of its parts, as reward/name."""
    return {f"{prefix}reward/{name}": math.fsum(values) / len(values) for name, values in parts.items()}


def repeated_ngrams(responses: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of n-grams that stood in the same response before; a policy that games its reward repeats itself."""
    total = repeated = 0
    for response in responses:
        grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return held-out scores before and after, and the standard error of the mean difference, prompt by prompt."""
    if not before:
        return dict.fromkeys(COMPARED)
    return {
        "eval_scores_before": before["eval/scores"],
        "eval_scores_after": after["eval/scores"],
        "eval_scores_gain_se": paired(before["scores"], after["scores"])[1],
        "eval_kl": after["eval/kl"],
        "eval_repeated_4grams_before": before["eval/repeated_4grams"],
        "eval_repeated_4grams_after": after["eval/repeated_4grams"],
    }


def mean_of(rows: Sequence[Sequence[float]], names: Sequence[str]) -> Metrics:
    """Average per-minibatch statistics, and take the largest of those that are a largest; None where there were none."""
    if not rows:
        return dict.fromkeys(names)
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return {name: max(column) if name.endswith("_max") else math.fsum(column) / len(rows) for name, column in columns.items()}


def spikes(rows: Sequence[Sequence[float]]) -> Metrics:
    """Return the largest share of clipped tokens among the minibatches, rows of `POLICY`; None where there were none."""
    clipped = [row[POLICY.index("policy/clip_frac")] for row in rows]
    return {"policy/clip_frac_max": max(clipped, default=None)}
