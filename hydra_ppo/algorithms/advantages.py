"""Advantages of the tokens that were drawn: with a critic, by comparison within a group, or against a running mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.algorithms.penalties import last_tokens


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    gae_lambda: float | Tensor,
    after_last: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γ λ A_{t+1},   return_t = A_t + V_t.
    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.

    Args:
        rewards, values: (B, R); values[t] is the state before token t.
        response_mask: (B, R) bool; True for a prefix of each row.
        gae_lambda: λ, one for all or (B,) one for each row.
        after_last: (B,) value of the state after the last token; None is 0 everywhere: the response has ended.

    Returns:
        advantages (B, R) and returns (B, R), zero where the mask is False.
    """
    mask = response_mask.to(values.dtype)
    values = values * mask
    if after_last is not None:
        last = last_tokens(response_mask)
        rewards = rewards + gamma * last * after_last[:, None]  # what comes after is 0 else, and so is V_{t+1}
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


def length_lambda(response_mask: Tensor, alpha: float) -> Tensor:
    """Return (B,) a λ for each response that grows with its length n: 1 - 1 / (alpha n), and not below 0.

    Source: VAPO, Yue et al. 2025 (arXiv 2504.05118), section 4 (alpha 0.05).
    """
    lengths = response_mask.sum(dim=1).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


def rewards_to_go(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Return (B, R) G_t = r_t + γ G_{t+1}, zero where the mask is False; rewards are (B, R)."""
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma, 1.0)[0]


def group_advantages(rewards: Tensor, size: int, by_std: bool, eps: float = 1e-6) -> Tensor:
    """Compare each response with the mean of its group: A_i = R_i - mean(R), over std(R) + eps where `by_std`.

    Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; without the division, Dr.GRPO, Liu et al. 2025
    (arXiv 2503.20783). The standard deviation is the unbiased one; the paper does not say which.

    Args:
        rewards: (B,) of whole responses, the `size` responses to a prompt next to each other.
        size: responses of a group, at least 2.

    Returns:
        (B,); zeros in a group where all are equal.
    """
    groups = rewards.view(-1, size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)  # its mean may be off by a rounding
    if by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + eps)
    return centred.masked_fill(equal, 0.0).flatten()


def rloo_advantages(rewards: Tensor, size: int) -> Tensor:
    """Compare each response with the mean of the others of its group: A_i = R_i - mean of R_j over j ≠ i.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2. Arguments and result as of `group_advantages`.
    """
    return group_advantages(rewards, size, by_std=False) * (size / (size - 1))


def increase_variance(rewards: Tensor, log_weights: Tensor, lowest: Tensor, highest: Tensor, size: int) -> Tensor:
    """Spread the rewards of a group as far as its weighted mean, its order and the bounds allow.

    max Σ p_i z_i²  with  lowest <= z_i <= highest,  Σ p_i z_i = Σ p_i r_i,  order kept.  With rewards sorted from the highest,
    C(k) = p_1 + ... + p_k and q = (Σ p r - lowest) / (highest - lowest): the first k, the largest with C(k) <= q, get the
    highest, the next gets what is left of the mean, the others the lowest. Equal rewards are one, with their weights added.

    Source: GRPOVI (arXiv 2505.23247); the closed form is derived in docs/methods.md, and tested against enumeration.
    O(n log n) for a group of n.

    Args:
        rewards: (B,), the `size` responses to a prompt next to each other.
        log_weights: (B,) logarithms of weights, which need not add up to 1.
        lowest, highest: () bounds of rewards.
        size: responses of a group.

    Returns:
        (B,); groups where all rewards are equal, and all where the bounds leave no room, are as they were.
    """
    order = rewards.view(-1, size).argsort(dim=1, descending=True, stable=True)
    sorted_ = rewards.view(-1, size).gather(1, order).double()
    weights = log_weights.view(-1, size).double().softmax(dim=1).gather(1, order)
    first = torch.ones_like(sorted_, dtype=torch.bool)
    first[:, 1:] = sorted_[:, 1:] != sorted_[:, :-1]
    pool = first.cumsum(dim=1) - 1  # number of the tie that each belongs to
    pooled = torch.zeros_like(weights).scatter_add_(1, pool, weights)
    low, high = lowest.double(), highest.double()
    room = high - low
    share = ((weights * (sorted_ - low)).sum(dim=1, keepdim=True) / room.clamp(min=1e-300)).clamp(0.0, 1.0)
    before = pooled.cumsum(dim=1) - pooled  # C(k - 1)
    part = ((share - before) / pooled.clamp(min=1e-300)).clamp(0.0, 1.0)  # 1 up to k, then what is left, then 0
    spread = torch.empty_like(sorted_).scatter_(1, order, low + room * part.gather(1, pool))
    kept = (first.sum(dim=1, keepdim=True) == 1) | (room <= 0)
    return torch.where(kept, rewards.view(-1, size).double(), spread).to(rewards.dtype).flatten()


def bounded_values(raw: Tensor, lowest: float, highest: float) -> Tensor:
    """Keep values within the bounds of returns: lowest + (highest - lowest) (½ + atan(raw) / π), any shape.

    Source: BPCO (arXiv 2608.23566).
    """
    return lowest + (highest - lowest) * (0.5 + torch.atan(raw) / math.pi)


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
