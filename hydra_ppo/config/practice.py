"""What the actor keeps practising beside PPO, as settings."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_ppo.config.fields import check, expand_home, positive, setting


@dataclass(frozen=True)
class PtxSettings:
    """Answers that the actor goes on learning by heart while PPO trains it."""

    data: str | None = setting(
        None, "Preference pairs whose chosen answers are practised at each optimizer step; null practises none."
    )
    coef: float = setting(0.1, "Length of that gradient, in those of PPO's own; above 1 it outweighs PPO.")
    minibatch_size: int | None = setting(None, "Answers per optimizer step; null is that of PPO.")

    def __post_init__(self) -> None:
        expand_home(self, "data")
        positive(self, "coef", "minibatch_size")
        _check_used(self)


@dataclass(frozen=True)
class RehearsalSettings:
    """The best of those answers, of each kind, by the run's own reward model (selective rehearsal)."""

    data: str | None = setting(None, "Preference pairs among whose chosen answers the best are rehearsed; null rehearses none.")
    coef: float = setting(0.01, "Weight of their cross-entropy in the actor's loss.")
    clusters: int = setting(10, "Kinds of answers, found by k-means over their mean hidden states.")
    share: float = setting(0.1, "Share of each kind that is rehearsed, the best by the reward head.")
    minibatch_size: int | None = setting(None, "Answers per optimizer step; null is that of PPO.")

    def __post_init__(self) -> None:
        expand_home(self, "data")
        positive(self, "coef", "clusters", "minibatch_size")
        check(self, "share", 0 < self.share <= 1, "must lie in (0, 1]", "choose for example 0.1")
        _check_used(self)


def _check_used(settings: PtxSettings | RehearsalSettings) -> None:
    """Refuse settings without data, which would be passed over."""
    for name, item in type(settings).__dataclass_fields__.items():
        if name != "data" and settings.data is None:
            given = getattr(settings, name) == item.default
            check(settings, name, given, "has nothing to do without data", "name a file of pairs, or leave it out")
