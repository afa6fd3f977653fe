"""Advantages of the tokens that were drawn, and how well values foresee returns."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_ppo.algorithms.masked import masked_mean


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
