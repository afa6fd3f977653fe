"""Which settings of PPO go with which advantages, and which would be passed over."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hydra_ppo.errors import ConfigError

OF_CRITIC = (
    *("critic_learning_rate", "gae_lambda", "actor_lambda", "critic_lambda", "bootstrap_truncated", "value_clip_range"),
    *("value_range", "vf_coef", "critic_warmup_steps", "critic_updates_per_actor", "update_order"),
)
"""Settings that have nothing to do without a critic."""
GROUPS = ("group", "rloo")


def check_advantage(config: Any) -> None:
    """Refuse settings that contradict the advantages, or that they do not read.

    Args:
        config: a `PPOConfig`, whose own check this is a part of.

    Raises:
        ConfigError: naming the first.
    """
    kind = config.advantage
    for name in OF_CRITIC if kind != "gae" else ():
        _refuse_set(config, name, f"is of the critic, and advantage={kind!r} has none")
    if kind != "gae" and config.model.lora.critic_rank is not None:
        raise ConfigError(
            f"model.lora.critic_rank={config.model.lora.critic_rank} is of the critic, and advantage={kind!r} has none; leave "
            "it out."
        )
    stops = config.monitor.stop_on_alarm
    if kind != "gae" and isinstance(stops, list) and "explained_variance" in stops:
        raise ConfigError(
            f"monitor.stop_on_alarm names explained_variance, which is of the critic, and advantage={kind!r} has none; leave "
            "it out."
        )
    if kind != "group":
        _refuse_set(config, "group_std", f"is of advantage='group', and it is {kind!r}")
    if kind != "reinforce":
        _refuse_set(config, "baseline_decay", f"is of advantage='reinforce', and it is {kind!r}")
    if config.actor_lambda != "length":
        _refuse_set(config, "lambda_alpha", "is of actor_lambda='length', which is not set")
    if kind in GROUPS:
        _check_groups(config)
    else:
        _refuse_set(config, "variance_increase", f"is of advantage='group' or 'rloo', and it is {kind!r}")
    if config.value_range is not None:
        _check_range(config, config.value_range)
    _check_pessimism(config)


def _check_groups(config: Any) -> None:
    kind, size = config.advantage, config.rollout.samples_per_prompt
    if size < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt={size} leaves advantage={kind!r} nothing to compare an answer with; choose at least "
            "2, for example 8."
        )
    _refuse_set(config, "gamma", f"discounts tokens, and advantage={kind!r} compares whole answers")


def _check_pessimism(config: Any) -> None:
    """Refuse a penalty that would always be 0."""
    size = config.rollout.samples_per_prompt
    for index, source in enumerate(config.reward.sources if size < 2 else ()):
        if source.aggregate == "pessimism":
            raise ConfigError(
                f"reward.sources[{index}].aggregate='pessimism' holds an answer against the others to its prompt, and "
                f"rollout.samples_per_prompt={size} leaves none; choose at least 2."
            )


def _check_range(config: Any, bounds: list[float]) -> None:
    """Refuse bounds of values that returns can leave."""
    given = f"value_range={bounds!r}"
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ConfigError(f"{given} is not a lower and a higher bound; write for example [-5, 5].")
    clip, penalty = config.reward.score_clip, config.reward.missing_eos_penalty
    if clip is None:
        raise ConfigError(f"{given} bounds values, and scores have no bounds; set reward.score_clip.")
    if config.kl.place == "reward" and config.kl.coef > 0 and config.kl.estimator != "none":
        raise ConfigError(
            f"{given} bounds values, and the penalty in the rewards has no bounds; set kl.place=loss, or kl.estimator=none."
        )
    low, high = -clip - penalty, clip
    if bounds[0] > low or bounds[1] < high:
        raise ConfigError(f"{given} is narrower than the scores, which lie in [{low:g}, {high:g}]; widen it.")


def _refuse_set(config: Any, name: str, rule: str) -> None:
    default = next(item.default for item in fields(config) if item.name == name)
    if (value := getattr(config, name)) != default:
        raise ConfigError(f"{name}={value!r} {rule}; leave {name} out.")
