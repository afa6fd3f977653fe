"""What actor and critic minimise, and how far a sampler was from the policy."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hydra_ppo.algorithms.masked import masked_mean

Averaging = Literal["tokens", "sequences", "longest"]


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
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss.

    ρ = exp(logprobs - old_logprobs);  loss = mean of max(-A ρ, -A clip(ρ, 1 - clip_range, 1 + clip_range_high)), and where
    A < 0 at most -A dual_clip.
    Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7, with the sign of a loss; a higher upper bound, DAPO, Yu et al.
    2025 (arXiv 2503.14476), section 3.1; dual clip, Ye et al. 2020 (arXiv 1912.09729), equation 5.

    Args:
        logprobs, old_logprobs, advantages: (B, R).
        response_mask: (B, R) bool.
        clip_range_high: None is `clip_range`.
        dual_clip: above 1; None bounds nothing.
        count: () tokens of the whole minibatch; see `masked_mean`.
        weights: (B, R) of each token's loss, such as `importance_weights`; None is 1. The statistics are without them.

    Returns:
        The loss; approx_kl, the k3 estimate of KL(old || current) in nats per token; clip_frac, the share of
        tokens where the clipped term is the larger; ratio, the mean ρ.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~response_mask, 0.0)
    ratio = log_ratio.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    with torch.no_grad():
        approx_kl = masked_mean(ratio - 1 - log_ratio, response_mask, count)
        clip_frac = masked_mean((clipped > unclipped).to(ratio.dtype), response_mask, count)
        mean_ratio = masked_mean(ratio, response_mask, count)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    if weights is not None:
        losses = losses * weights
    return PolicyLoss(masked_mean(losses, response_mask, count), approx_kl, clip_frac, mean_ratio)


def averaging_weights(response_mask: Tensor, how: Averaging, rows: int, count: Tensor, longest: int) -> Tensor | None:
    """Return the weight of each token that turns a mean over tokens into another average; None where it is that mean.

    `sequences` is the mean over responses of the mean over each one's tokens; `longest` the sum over tokens divided by
    responses times the longest length, so that a token weighs the same in any response and any batch.
    Sources: by sequences, GRPO, Shao et al. 2024 (arXiv 2402.03300), equation 3; by tokens, DAPO, Yu et al. 2025 (arXiv
    2503.14476), section 3.3; by the longest length, Dr.GRPO, Liu et al. 2025 (arXiv 2503.20783).

    Args:
        response_mask: (B, R) bool, of a micro-batch.
        rows, count: responses and () tokens of the whole minibatch.
        longest: tokens that a response may have.

    Returns:
        (B, R) or (B, 1), for `masked_mean` with `count` as its divisor.
    """
    if how == "tokens":
        return None
    if how == "longest":
        return (count / (rows * longest)).expand(response_mask.shape[0], 1)
    return count / (rows * response_mask.sum(dim=1, keepdim=True).clamp(min=1))


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
