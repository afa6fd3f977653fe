"""From scores to advantages: what each token of a rollout gets, by the kind of advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_ppo.algorithms.advantages import (
    gae,
    group_advantages,
    increase_variance,
    length_lambda,
    rewards_to_go,
    rloo_advantages,
)
from hydra_ppo.algorithms.masked import whiten
from hydra_ppo.algorithms.penalties import kl_penalised_rewards
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.experience import FinishedExperience, ScoredExperience


@dataclass
class RunningRewards:
    """What rewards were so far.

    Attributes:
        mean: running mean of the rewards of whole responses, penalty included; None before the first.
        lowest, highest: of all scores.
    """

    mean: float | None = None
    lowest: float | None = None
    highest: float | None = None

    def see(self, scores: Sequence[float]) -> None:
        """Take in the scores of a rollout."""
        self.lowest = min(scores) if self.lowest is None else min(self.lowest, *scores)
        self.highest = max(scores) if self.highest is None else max(self.highest, *scores)


def with_advantages(
    experience: ScoredExperience,
    scores: Tensor,
    config: PPOConfig,
    kl_coef: float,
    running: RunningRewards | None = None,
    ended: Sequence[bool] | None = None,
    warming_up: bool = False,
) -> FinishedExperience:
    """Find advantages and returns, both (B, R), from scores (B,) and the rollout's log-probs and values.

    Args:
        experience: the responses to a prompt next to each other, where they are compared.
        running: what rewards were so far, which this rollout is added to; a run's first where None.
        ended: whether each response came to its end, where those that did not go on in the critic's value.
        warming_up: the critic is trained alone, towards Monte Carlo returns.

    Returns:
        The experience with both; returns are 0 where there is no critic to learn them.
    """
    running = running or RunningRewards()
    mask = experience.response_mask
    if config.variance_increase != "off":
        running.see(scores.tolist())
        scores = _spread(experience, scores, config, running)
    estimator = config.kl.estimator if config.kl.place == "reward" else "none"
    rewards = kl_penalised_rewards(scores, experience.old_logprobs, experience.ref_logprobs, mask, kl_coef, estimator)
    returns = torch.zeros_like(rewards)
    if config.advantage == "gae":
        after = _after_last(experience, ended)
        advantages, returns = _with_critic(rewards, experience.old_values, mask, config, after, warming_up)
    elif config.advantage == "reinforce":
        mean = rewards.sum(dim=1).mean().item()
        baseline = mean if running.mean is None else running.mean
        running.mean = config.baseline_decay * baseline + (1 - config.baseline_decay) * mean
        advantages = (rewards_to_go(rewards, mask, config.gamma) - baseline).masked_fill(~mask, 0.0)
    else:
        whole, size = rewards.sum(dim=1), config.rollout.samples_per_prompt
        compared = (
            rloo_advantages(whole, size) if config.advantage == "rloo" else group_advantages(whole, size, config.group_std)
        )
        advantages = compared[:, None].expand_as(rewards).masked_fill(~mask, 0.0)
    if config.whitens:
        advantages = whiten(advantages, mask)
    return experience.finished(advantages, returns)


def _with_critic(
    rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig, after_last: Tensor | None, warming_up: bool
) -> tuple[Tensor, Tensor]:
    """Return advantages of the actor and the critic's targets, each with its own decay."""
    decay: float | Tensor = config.gae_lambda
    if config.actor_lambda == "length":
        decay = length_lambda(mask, config.lambda_alpha)
    elif config.actor_lambda is not None:
        decay = config.actor_lambda
    critics = config.gae_lambda if config.critic_lambda is None else config.critic_lambda
    critics = 1.0 if warming_up else critics
    advantages, returns = gae(rewards, values, mask, config.gamma, decay, after_last)
    if isinstance(decay, Tensor) or decay != critics:
        _, returns = gae(rewards, values, mask, config.gamma, critics, after_last)
    return advantages, returns


def _after_last(experience: ScoredExperience, ended: Sequence[bool] | None) -> Tensor | None:
    """Return (B,) values of what follows responses that were cut, 0 for those that ended."""
    if experience.after_last is None or ended is None:
        return None
    return experience.after_last.masked_fill(torch.tensor(list(ended), device=experience.after_last.device), 0.0)


def _spread(experience: ScoredExperience, scores: Tensor, config: PPOConfig, running: RunningRewards) -> Tensor:
    """Return scores (B,) spread out within each group; between their bounds where settings give some, else the running ones."""
    clip = config.reward.score_clip
    low, high = (running.lowest, running.highest) if clip is None else (-clip - config.reward.missing_eos_penalty, clip)
    weights = torch.zeros_like(scores)
    if config.variance_increase != "uniform":
        weights = experience.ref_logprobs.sum(dim=1)
    if config.variance_increase == "length":
        weights = weights / experience.response_mask.sum(dim=1).clamp(min=1)
    lowest, highest = (torch.tensor(bound, device=scores.device, dtype=torch.float64) for bound in (low, high))
    return increase_variance(scores, weights, lowest, highest, config.rollout.samples_per_prompt)
