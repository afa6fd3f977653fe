"""What a PPO run watches itself for, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hydra_ppo.config.fields import check, positive, setting

AlarmName = Literal["over_optimisation", "length", "kl", "entropy", "explained_variance", "ratio", "spread"]
ALARMS: tuple[AlarmName, ...] = get_args(AlarmName)


@dataclass(frozen=True)
class MonitorSettings:
    """What a run watches itself for; it says so in a line, and goes on but where it is told to stop."""

    enabled: bool = setting(True, "Watch the metrics and raise alarms; they cost nothing and change nothing.")
    window: int = setting(10, "Steps, or evaluations, that an alarm looks back over.")
    significance: float = setting(0.05, "Largest p, one-sided, at which a trend or a difference counts.")
    length_r2: float | None = setting(
        0.3, "Alarm where log length explains more than this share of the scores' variance; null never."
    )
    kl_budget: float | None = setting(
        None, "Alarm where the KL from the reference is above this (nats per response); null never."
    )
    entropy_share: float | None = setting(
        0.2, "Alarm where the policy's entropy falls below this share of what it was at first; null never."
    )
    explained_variance: float | None = setting(
        0.0, "Alarm where the critic explains less than this share of the returns' variance; null never."
    )
    ratio_max: float | None = setting(
        20.0, "Alarm where an update makes a token this many times likelier than when it was drawn; null never."
    )
    clip_share: float | None = setting(0.5, "Alarm where over this share of a minibatch's tokens is clipped; null never.")
    spread: bool = setting(True, "Alarm where the members of a reward ensemble come apart (reward/head/spread rises).")
    stop_on_alarm: bool | list[AlarmName] = setting(
        False,
        "Stop as a finished run does, with everything saved, at any alarm (true) or at those named; --resume goes on, and "
        "stops at the same alarm again only after it has been off for a window of steps.",
    )

    def __post_init__(self) -> None:
        check(self, "window", self.window >= 4, "is too short for a trend to be significant", "choose 4 or more")
        check(self, "significance", 0 < self.significance < 0.5, "must lie in (0, 0.5)", "choose for example 0.05")
        for name in ("length_r2", "entropy_share", "clip_share"):
            value = getattr(self, name)
            check(self, name, value is None or 0 < value < 1, "must lie in (0, 1)", "choose a share, or null")
        positive(self, "kl_budget")
        limit = self.explained_variance
        check(self, "explained_variance", limit is None or limit < 1, "must be below 1, which is all", "choose for example 0")
        rule = "must be above 1, where every update begins"
        check(self, "ratio_max", self.ratio_max is None or self.ratio_max > 1, rule, "choose for example 20")
        rule = "stops at alarms that enabled=False never raises"
        check(self, "stop_on_alarm", self.enabled or not self.stop_on_alarm, rule, "set enabled=true, or leave it out")
        named = self.stop_on_alarm if isinstance(self.stop_on_alarm, list) else []
        idle = next((name for name in named if not self.watches(name)), None)
        rule = f"stops at {idle!r}, which is switched off"
        check(self, "stop_on_alarm", idle is None, rule, "give that its bound, or leave it out here")

    def watches(self, name: str) -> bool:
        """Say whether an alarm can be raised, as far as settings decide it."""
        bounds = {"length": self.length_r2, "kl": self.kl_budget, "entropy": self.entropy_share}
        bounds |= {"explained_variance": self.explained_variance, "ratio": self.ratio_max or self.clip_share}
        return self.enabled and (self.spread if name == "spread" else bounds.get(name, 1.0) is not None)

    def stops_at(self, name: str) -> bool:
        """Say whether a run stops at an alarm."""
        return name in self.stop_on_alarm if isinstance(self.stop_on_alarm, list) else self.stop_on_alarm
