"""The maths of PPO as pure functions of tensors.

Letters used here and everywhere else in the package: B batch rows, P prompt tokens, R response tokens,
T = P + R tokens, V vocabulary entries, H hidden units. Masks are bool, True where an entry counts.

Nothing here reads a tensor on the host: no ``.item()``, no ``if tensor`` and no shape that depends on data.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Average the entries of `x` that count.

    Args:
        x: any shape.
        mask: bool, the shape of `x`.
        count: () divisor; the number of True entries when None. Micro-batches pass the count of the whole
            minibatch, so that their sums add up to the minibatch's mean exactly.

    Returns:
        () mean; 0 where nothing counts.
    """
    count = mask.sum() if count is None else count
    return x.masked_fill(~mask, 0.0).sum() / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the entries that count to variance 1, and to mean 0 when `shift_mean`; zero elsewhere.

    Args:
        x: (B, R).
        mask: (B, R) bool.
        shift_mean: True gives mean 0; False keeps the mean that `x` had.
        eps: added to the variance.

    Returns:
        (B, R).
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k3"] = "k1") -> Tensor:
    """Estimate KL(actor || reference) per token from samples of the actor.

    With d = log actor(a|s) - log reference(a|s):  k1 = d;  k3 = exp(-d) - 1 + d.
    Both are unbiased; k3 is never negative. Source: Schulman, "Approximating KL Divergence" (2020).

    Args:
        logprobs, ref_logprobs: (B, R) in nats.

    Returns:
        (B, R) in nats.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    return torch.expm1(-difference) + difference


def kl_penalised_rewards(
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float | Tensor,
    estimator: Literal["k1", "k3"] = "k1",
) -> Tensor:
    """Reward each token with the KL penalty, and the last token of each response with its score too.

    r_t = -kl_coef * KL_t + [t is last] * score.  Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2.

    Args:
        scores: (B,).
        old_logprobs, ref_logprobs: (B, R) in nats.
        response_mask: (B, R) bool; True for the tokens 0..n-1 of a response of n >= 1 tokens.

    Returns:
        rewards (B, R), zero where the mask is False.
    """
    penalty = kl_penalty(old_logprobs, ref_logprobs, estimator)
    last = response_mask & (response_mask.cumsum(dim=1) == response_mask.sum(dim=1, keepdim=True))
    rewards = -kl_coef * penalty + last * scores[:, None]
    return rewards.masked_fill(~response_mask, 0.0)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over responses that end (the value after the last token is 0).

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   return_t = A_t + V_t.
    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.

    Args:
        rewards, values: (B, R); values[t] is the state before token t.
        response_mask: (B, R) bool; True for a prefix of each row.

    Returns:
        advantages (B, R) and returns (B, R), zero where the mask is False.
    """
    mask = response_mask.to(values.dtype)
    values = values * mask
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        next_value = values[:, t]
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], dim=1)  # (B, R)
    return stacked, (stacked + values) * mask


class PolicyLoss(NamedTuple):
    """Loss with graph and its statistics without; each a () sum over this micro-batch divided by `count`."""

    loss: Tensor
    approx_kl: Tensor
    clip_frac: Tensor
    ratio: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    count: Tensor | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss.

    ρ = exp(logprobs - old_logprobs);  loss = mean of max(-A ρ, -A clip(ρ, 1 - clip_range, 1 + clip_range)).
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7, with the sign of a loss.

    Args:
        logprobs, old_logprobs, advantages: (B, R).
        response_mask: (B, R) bool.
        count: () tokens of the whole minibatch; see `masked_mean`.
        weights: (B, R) of each token's loss, such as `importance_weights`; None is 1. The statistics are without them.

    Returns:
        The loss; approx_kl, the k3 estimate of KL(old || current) in nats per token; clip_frac, the share of
        tokens where the clipped term is the larger; ratio, the mean ρ.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        approx_kl = masked_mean(ratio - 1 - log_ratio, response_mask, count)
        clip_frac = masked_mean((clipped > unclipped).to(ratio.dtype), response_mask, count)
        mean_ratio = masked_mean(ratio, response_mask, count)
    losses = torch.maximum(unclipped, clipped)
    if weights is not None:
        losses = losses * weights
    return PolicyLoss(masked_mean(losses, response_mask, count), approx_kl, clip_frac, mean_ratio)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Weigh tokens by how much likelier the policy makes them than the sampler that drew them, up to a cap.

    w = min(cap, exp(old_logprobs - sampler_logprobs)).  With every w uncapped the weighted mean over what the sampler drew
    is the mean over what the policy would draw; the cap bounds the variance and costs a bias.
    Source: Ionides 2008 (Truncated importance sampling, J. Comput. Graph. Stat. 17), per token.

    Args:
        old_logprobs, sampler_logprobs: (B, R) in nats; equal where nothing counts.
        cap: at least 1.

    Returns:
        (B, R) without a graph.
    """
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def logprob_drift(sampler_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return (2,) mean and largest |difference|, in nats per token, of the tokens that count.

    Args:
        sampler_logprobs, logprobs: (B, R) in nats.
        mask: (B, R) bool, at least one True.
    """
    away = (sampler_logprobs - logprobs).abs().masked_fill(~mask, 0.0)
    return torch.stack([masked_mean(away, mask), away.max()])


class ValueLoss(NamedTuple):
    """Loss with graph and its statistics without; each a () sum over this micro-batch divided by `count`."""

    loss: Tensor
    clip_frac: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    value_clip_range: float | None,
    count: Tensor | None = None,
) -> ValueLoss:
    """Squared error to the returns, with the step away from the rollout's values clipped.

    loss = ½ mean of max((V - ret)², (clip(V, V_old ± value_clip_range) - ret)²).
    Source: the PPO reference implementation (openai/baselines, ppo2); the paper has the unclipped term only.

    Args:
        values, old_values, returns: (B, R).
        response_mask: (B, R) bool.
        value_clip_range: None clips nothing.
        count: () tokens of the whole minibatch; see `masked_mean`.
    """
    error = (values - returns) ** 2
    if value_clip_range is None:
        return ValueLoss(0.5 * masked_mean(error, response_mask, count), error.new_zeros(()))
    near = torch.clamp(values, old_values - value_clip_range, old_values + value_clip_range)
    clipped_error = (near - returns) ** 2
    with torch.no_grad():
        clip_frac = masked_mean((clipped_error > error).to(error.dtype), response_mask, count)
    return ValueLoss(0.5 * masked_mean(torch.maximum(error, clipped_error), response_mask, count), clip_frac)


def ranking_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Bradley-Terry loss of preference pairs: -log sigmoid(r_chosen - r_rejected), one value per pair.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for one pair per prompt.

    Args:
        chosen_scores, rejected_scores: (B,).

    Returns:
        (B,).
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
    """Share of the variance of the returns that the values predict: 1 - Var(ret - V) / Var(ret).

    Args:
        values, returns: (B, R).
        response_mask: (B, R) bool.

    Returns:
        () at most 1; NaN where the returns do not vary.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, response_mask)) ** 2, response_mask)

    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(returns - values) / spread, torch.full_like(spread, float("nan")))


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """Move the KL coefficient towards the one at which the KL meets its target.

    e = clip(kl / target - 1, -0.2, 0.2);  kl_coef <- kl_coef (1 + e * responses / horizon).
    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl: mean KL per response of this rollout, in nats; `target` likewise.
        horizon, responses: in responses.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)
