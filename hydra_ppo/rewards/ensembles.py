"""Scores of a reward head that has several members: what they say together, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hydra_ppo.algorithms.ensembles import combine_members, disagreements, spread
from hydra_ppo.config.rewards import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError


def check_aggregates(settings: RewardSettings, heads: int) -> None:
    """Refuse an aggregate of members that there are not.

    Args:
        settings: the sources.
        heads: members of the model's own reward head.

    Raises:
        ConfigError: naming the source.
    """
    for index, source in enumerate(settings.sources):
        if source.kind == "head" and source.target is None and source.aggregate != "mean" and heads == 1:
            raise ConfigError(
                f"reward.sources[{index}].aggregate={source.aggregate!r} needs a model with several reward heads, this one has "
                "1; train it with reward_heads above 1 in hydra-ppo sft, or leave aggregate out."
            )


def head_scores(source: RewardSource, scores: Sequence[float], members: Tensor | None) -> Sequence[float]:
    """Return what a reward head says of each response.

    Args:
        source: how its members count.
        scores: their mean.
        members: (B, k) what each of them says; None where there is one.
    """
    if members is None or source.aggregate == "mean" or source.aggregate == "pessimism":  # the latter is of other heads
        return scores
    combined: list[float] = combine_members(members, source.aggregate, source.aggregate_coef).tolist()
    return combined


def disagreement_parts(members: Tensor | None) -> dict[str, list[float]]:
    """Return how far the members (B, k) are apart, by response; nothing where there is one member.

    `spread` is the standard deviation over the members, `disagree` 1 where they differ on whether the response is better than
    the one after it. Both are to be watched, and no part of the score.
    """
    if members is None:
        return {}
    return {"spread": spread(members).tolist(), "disagree": disagreements(members).float().tolist()}
