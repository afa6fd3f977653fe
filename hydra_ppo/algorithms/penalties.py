"""What keeps the actor near the reference: estimates of how far it is, and rewards that pay for it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["none", "k1", "k3", "js", "js_unbiased", "squared"]
"""`none` penalises nothing; the others are those of `kl_penalty`."""


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimate per token, from samples of the actor, how far it is from the reference.

    With d = log actor(a|s) - log reference(a|s):

    - `k1` = d and `k3` = exp(-d) - 1 + d estimate KL(actor || reference) without bias; k3 is never negative.
    - `squared` = d² / 2: its gradient, taken through the log-probs, has the KL's expectation.
    - `js` = ½ (max(log π - log μ, 0) + max(log π_ref - log μ, 0)) with μ = (π + π_ref) / 2 at the sampled token, which is
      ½ (log 2 - log(1 + exp(-|d|))): symmetric in d, at most ½ log 2, slope at most ¼.
    - `js_unbiased` = ½ [log 2 - log(1 + u)] + ½ u [log 2 - d - log(1 + u)] with u = exp(-d) up to 1000: without bias of the
      Jensen-Shannon divergence, where the cap is not met.

    Sources: k1, k3 and squared, Schulman, "Approximating KL Divergence" (2020); js, Sun et al. 2023 (arXiv 2309.09055).

    Args:
        logprobs, ref_logprobs: (B, R) in nats.
        estimator: `none` gives zeros.

    Returns:
        (B, R) in nats.
    """
    difference = logprobs - ref_logprobs
    if estimator == "none":
        return torch.zeros_like(difference)
    if estimator == "k1":
        return difference
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    if estimator == "squared":
        return 0.5 * difference.square()
    if estimator == "js":
        return 0.5 * (math.log(2) - torch.log1p(torch.exp(-difference.abs())))
    capped = difference.clamp(min=-math.log(1e3))
    ratio = torch.exp(-capped)  # π_ref / π
    mixed = torch.log1p(ratio)
    return 0.5 * (math.log(2) - mixed) + 0.5 * ratio * (math.log(2) - capped - mixed)


def kl_penalised_rewards(
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float | Tensor,
    estimator: Estimator = "k1",
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
    rewards = -kl_coef * penalty + last_tokens(response_mask) * scores[:, None]
    return rewards.masked_fill(~response_mask, 0.0)


def last_tokens(response_mask: Tensor) -> Tensor:
    """Return (B, R) bool, True at the last token of each response."""
    return response_mask & (response_mask.cumsum(dim=1) == response_mask.sum(dim=1, keepdim=True))


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
