"""Every setting of PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from hydra_ppo.config.advantage import check_advantage
from hydra_ppo.config.data import DataSettings
from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import fraction as _fraction
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.fields import setting
from hydra_ppo.config.model import ModelSettings
from hydra_ppo.config.monitor import MonitorSettings
from hydra_ppo.config.practice import PtxSettings, RehearsalSettings
from hydra_ppo.config.rewards import RewardSettings, RewardSource, check_evaluators
from hydra_ppo.config.rollout import RolloutSettings
from hydra_ppo.config.running import OptimizerSettings, RunSettings
from hydra_ppo.errors import ConfigError


@dataclass(frozen=True)
class KLSettings:
    """The penalty that keeps the actor near the reference."""

    coef: float = setting(0.02, "Weight of the per-token penalty (kl_coef).")
    estimator: Literal["none", "k1", "k3", "js", "js_unbiased", "squared"] = setting(
        "k1",
        "What is penalised, d being the log-ratio of actor and reference: k1 is d; k3 exp(-d) - 1 + d, never negative, lower "
        "variance; squared d^2 / 2; js a bounded divergence that saturates, js_unbiased the same without bias; none nothing.",
    )
    place: Literal["reward", "loss"] = setting(
        "reward", "Where the penalty goes: into the rewards of the rollout, or into the actor's loss, with its gradient."
    )
    adaptive: bool = setting(False, "Steer the coefficient towards the target KL.")
    target: float = setting(6.0, "KL per response, in nats, that the adaptive coefficient aims at.")
    horizon: int = setting(10000, "Responses over which the adaptive coefficient reacts.")

    def __post_init__(self) -> None:
        _not_negative(self, "coef")
        _positive(self, "target", "horizon")
        useless = self.place == "loss" and self.estimator == "k1"
        rule = "in the loss has a gradient that is 0 on average"
        _check(self, "estimator", not useless, rule, "use k3 or squared there, or place=reward")
        steered = self.adaptive and self.estimator == "none"
        _check(self, "adaptive", not steered, "steers a penalty, and estimator='none' has none", "choose an estimator")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with all four roles on one base."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    rollout: RolloutSettings = setting(RolloutSettings, "How responses are sampled.")
    reward: RewardSettings = setting(RewardSettings, "What the score is made of.")
    kl: KLSettings = setting(KLSettings, "The penalty that keeps the actor near the reference.")
    optimizer: OptimizerSettings = setting(lambda: OptimizerSettings(learning_rate=5e-5), "AdamW and its schedule.")
    critic_learning_rate: float | None = setting(None, "Peak learning rate of the critic; null is the actor's.")
    steps: int | None = setting(
        None, "PPO steps: rollouts, each followed by its updates; null is as many as epochs makes, or 100 without."
    )
    epochs: int | None = setting(None, "Passes over the training prompts, in place of steps.")
    ppo_epochs: int = setting(4, "Passes over each rollout.")
    minibatch_size: int = setting(16, "Responses per optimizer step.")
    microbatch_size: int = setting(4, "Most responses per forward and backward pass.")
    microbatch_tokens: int | None = setting(
        None, "Most tokens, padding included, per forward and backward pass; null sets no limit."
    )
    advantage: Literal["gae", "group", "rloo", "reinforce"] = setting(
        "gae",
        "gae: a critic; group: against the mean of the answers to the same prompt, as GRPO; rloo: against the mean of the "
        "others of them; reinforce: against a running mean. All but gae have no critic in memory and make no pass for one.",
    )
    group_std: bool = setting(True, "group: divide by the standard deviation of the group; false is Dr.GRPO's form.")
    variance_increase: Literal["off", "reference", "length", "uniform"] = setting(
        "off",
        "group, rloo: spread the scores of a group as far as mean, order and bounds allow (GRPOVI), answers weighted by the "
        "reference's probability, by that per token, or alike.",
    )
    baseline_decay: float = setting(0.95, "reinforce: what a step leaves of the running mean of rewards.")
    gamma: float = setting(1.0, "Discount per token.")
    gae_lambda: float = setting(0.95, "Decay of generalised advantage estimation.")
    actor_lambda: float | Literal["length"] | None = setting(
        None, "gae_lambda of the advantages; length is 1 - 1 / (lambda_alpha * tokens of the response); null is gae_lambda."
    )
    lambda_alpha: float = setting(0.05, "actor_lambda=length: how fast the decay vanishes with the length.")
    critic_lambda: float | None = setting(None, "gae_lambda of the critic's targets, 1 being Monte Carlo; null is gae_lambda.")
    bootstrap_truncated: bool = setting(
        False, "Let a response that was cut at max_new_tokens go on in the critic's value of what follows, instead of in 0."
    )
    whiten_advantages: bool | None = setting(
        None, "Give the advantages of a rollout mean 0 and variance 1; null does so with gae and reinforce."
    )
    clip_range: float = setting(0.2, "Policy ratio clip.")
    clip_range_high: float | None = setting(None, "The clip's upper bound is 1 + this; null is clip_range.")
    dual_clip: float | None = setting(None, "Bound the loss of tokens with a negative advantage by this many times it.")
    loss_average: Literal["tokens", "sequences", "longest"] = setting(
        "tokens", "Average the policy loss over tokens, over responses each by its tokens, or over max_new_tokens of each."
    )
    value_clip_range: float | None = setting(0.2, "Value clip around the rollout's values; null clips nothing.")
    value_range: list[float] | None = setting(
        None, "Bounds of the critic's values, which then cannot leave them; needs bounded scores (reward.score_clip)."
    )
    vf_coef: float = setting(0.5, "Weight of the value loss.")
    entropy_coef: float = setting(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = setting(
        None, "Stop updating the actor in a step once its approximate KL to the rollout policy passes this (nats per token)."
    )
    critic_warmup_steps: int = setting(0, "First steps in which only the critic is updated, towards Monte Carlo returns.")
    critic_updates_per_actor: int = setting(1, "Optimizer steps of the critic for each of the actor, on the same minibatch.")
    ema_decay: float | None = setting(
        None,
        "Keep a running mean of the actor's adapter, actor_ema; at each optimizer step it keeps this share of itself.",
    )
    ptx: PtxSettings = setting(PtxSettings, "Answers that the actor goes on learning by heart.")
    rehearsal: RehearsalSettings = setting(RehearsalSettings, "The best of such answers, of each kind.")
    sample_every: int = setting(10, "Record samples every this many steps.")
    eval_every: int = setting(0, "Score held-out prompts every this many steps; 0 only before and after training.")
    eval_prompts: int = setting(128, "Held-out prompts used per evaluation.")
    eval_rewards: list[RewardSource] = setting(
        list,
        "Rewards that judge the held-out answers beside the score and never enter training: what shows whether a score that "
        "rises means anything. Written as reward.sources are.",
    )
    monitor: MonitorSettings = setting(MonitorSettings, "What the run watches itself for.")
    update_order: Literal["together", "in-turn"] = setting(
        "together",
        "Step actor and critic together, or in-turn: the actor, then the critic, so that one role's gradients exist at a time. "
        "The same bits, but for fp16 where gradients overflow.",
    )

    def __post_init__(self) -> None:
        _positive(self, "steps", "epochs", "critic_learning_rate", "ppo_epochs")
        _positive(self, "minibatch_size", "microbatch_size", "microbatch_tokens")
        _positive(self, "clip_range", "clip_range_high", "value_clip_range", "vf_coef", "target_kl", "sample_every")
        _positive(self, "eval_prompts", "lambda_alpha", "critic_updates_per_actor")
        _not_negative(self, "entropy_coef", "critic_warmup_steps", "eval_every")
        both = self.steps is not None and self.epochs is not None
        _check(self, "epochs", not both, f"and steps={self.steps} both say how long the run is", "leave one out")
        _fraction(self, "gamma", "gae_lambda", "critic_lambda", "baseline_decay")
        if self.actor_lambda != "length":
            _fraction(self, "actor_lambda")
        _check(
            self, "dual_clip", self.dual_clip is None or self.dual_clip > 1, "must be greater than 1", "choose for example 3"
        )
        within = self.ema_decay is None or 0 < self.ema_decay < 1
        _check(self, "ema_decay", within, "must lie in (0, 1)", "choose for example 0.992")
        check_evaluators(self.eval_rewards, self.reward.sources)
        if self.eval_rewards and self.data.eval is None and self.data.eval_fraction == 0:
            raise ConfigError(
                "eval_rewards judge answers to held-out prompts, and data.eval=None with data.eval_fraction=0.0 holds none; "
                "name data.eval, or choose for example data.eval_fraction=0.05."
            )
        stops = self.monitor.stop_on_alarm
        if isinstance(stops, list) and "over_optimisation" in stops and not self.eval_rewards:
            raise ConfigError(
                "monitor.stop_on_alarm names over_optimisation, which is seen by eval_rewards, and there are none; name an "
                "independent reward there, or leave it out."
            )
        rows = self.rollout.batch_size
        if rows % self.minibatch_size:
            raise ConfigError(
                f"rollout.batch_size={rows} is not divisible by minibatch_size={self.minibatch_size}; "
                f"choose a minibatch_size that divides {rows}."
            )
        check_advantage(self)

    def total_steps(self, prompts: int) -> int:
        """Return the PPO steps of a run over so many training prompts."""
        if self.epochs is None:
            return self.steps or 100
        return math.ceil(self.epochs * prompts / (self.rollout.batch_size // self.rollout.samples_per_prompt))

    @property
    def has_critic(self) -> bool:
        """Whether advantages need a critic."""
        return self.advantage == "gae"

    @property
    def stage(self) -> Literal["ppo", "ppo-ema", "policy", "policy-ema"]:
        """What the model is built for: with a critic or without, with a running mean of the actor or without."""
        if self.ema_decay is None:
            return "ppo" if self.has_critic else "policy"
        return "ppo-ema" if self.has_critic else "policy-ema"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened; those of groups have a mean of 0 already, and a scale of their own."""
        return self.advantage in ("gae", "reinforce") if self.whiten_advantages is None else self.whiten_advantages

    def named_sources(self) -> list[tuple[str, RewardSource]]:
        """Return every source that is asked, in training or in evaluation, with the name of its setting."""
        trained = [(f"reward.sources[{index}]", source) for index, source in enumerate(self.reward.sources)]
        return trained + [(f"eval_rewards[{index}]", source) for index, source in enumerate(self.eval_rewards)]

    @property
    def evaluators(self) -> RewardSettings | None:
        """`eval_rewards` with what else is set of sources: time limit and isolation; None where there are none."""
        return replace(self.reward, sources=self.eval_rewards) if self.eval_rewards else None
