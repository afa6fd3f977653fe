"""What actor and critic minimise, and how far a sampler was from the policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hydra_ppo.algorithms.masked import masked_mean


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
