"""Every setting of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_ppo.config.data import DataSettings
from hydra_ppo.config.fields import fraction as _fraction
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.fields import setting
from hydra_ppo.config.model import ModelSettings
from hydra_ppo.config.rewards import RewardSettings
from hydra_ppo.config.rollout import RolloutSettings
from hydra_ppo.config.running import OptimizerSettings, RunSettings
from hydra_ppo.errors import ConfigError


@dataclass(frozen=True)
class KLSettings:
    """The penalty that keeps the actor near the reference."""

    coef: float = setting(0.02, "Weight of the per-token KL in the reward (kl_coef).")
    estimator: Literal["k1", "k3"] = setting("k1", "k1: log-ratio; k3: exp(-d) - 1 + d, never negative, lower variance.")
    adaptive: bool = setting(False, "Steer the coefficient towards the target KL.")
    target: float = setting(6.0, "KL per response, in nats, that the adaptive coefficient aims at.")
    horizon: int = setting(10000, "Responses over which the adaptive coefficient reacts.")

    def __post_init__(self) -> None:
        _not_negative(self, "coef")
        _positive(self, "target", "horizon")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with all four roles on one base."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    rollout: RolloutSettings = setting(RolloutSettings, "How responses are sampled.")
    reward: RewardSettings = setting(RewardSettings, "What the score is made of.")
    kl: KLSettings = setting(KLSettings, "The KL penalty.")
    optimizer: OptimizerSettings = setting(lambda: OptimizerSettings(learning_rate=5e-5), "AdamW and its schedule.")
    critic_learning_rate: float | None = setting(None, "Peak learning rate of the critic; null is the actor's.")
    steps: int = setting(100, "PPO steps: rollouts, each followed by its updates.")
    ppo_epochs: int = setting(4, "Passes over each rollout.")
    minibatch_size: int = setting(16, "Responses per optimizer step.")
    microbatch_size: int = setting(4, "Most responses per forward and backward pass.")
    microbatch_tokens: int | None = setting(
        None, "Most tokens, padding included, per forward and backward pass; null sets no limit."
    )
    gamma: float = setting(1.0, "Discount per token.")
    gae_lambda: float = setting(0.95, "Decay of generalised advantage estimation.")
    whiten_advantages: bool = setting(True, "Give the advantages of a rollout mean 0 and variance 1.")
    clip_range: float = setting(0.2, "Policy ratio clip.")
    value_clip_range: float | None = setting(0.2, "Value clip around the rollout's values; null clips nothing.")
    vf_coef: float = setting(0.5, "Weight of the value loss.")
    entropy_coef: float = setting(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = setting(
        None, "Stop updating the actor in a step once its approximate KL to the rollout policy passes this (nats per token)."
    )
    critic_warmup_steps: int = setting(0, "First steps in which only the critic is updated.")
    sample_every: int = setting(10, "Record samples every this many steps.")
    eval_every: int = setting(0, "Score held-out prompts every this many steps; 0 only before and after training.")
    eval_prompts: int = setting(128, "Held-out prompts used per evaluation.")
    update_order: Literal["together", "in-turn"] = setting(
        "together",
        "Step actor and critic together, or in-turn: the actor, then the critic, so that one role's gradients exist at a time. "
        "The same bits, but for fp16 where gradients overflow.",
    )

    def __post_init__(self) -> None:
        _positive(self, "critic_learning_rate", "steps", "ppo_epochs", "minibatch_size", "microbatch_size", "microbatch_tokens")
        _positive(self, "clip_range", "value_clip_range", "vf_coef", "target_kl", "sample_every", "eval_prompts")
        _not_negative(self, "entropy_coef", "critic_warmup_steps", "eval_every")
        _fraction(self, "gamma", "gae_lambda")
        rows = self.rollout.batch_size
        if rows % self.minibatch_size:
            raise ConfigError(
                f"rollout.batch_size={rows} is not divisible by minibatch_size={self.minibatch_size}; "
                f"choose a minibatch_size that divides {rows}."
            )
