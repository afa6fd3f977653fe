"""What keeps the actor near the reference: estimates of its KL, and rewards that pay for it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


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
