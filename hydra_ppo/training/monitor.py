"""What a PPO run watches itself for: alarms over the history of its metrics, each one line with what to do.

Nothing here reads a model or a device; given the same metrics it raises the same alarms. The history is part of the
trainer's state, so a run that was stopped raises what one in a piece does.

An alarm is raised when its sign appears, and again only after it has been off for more than a window of steps. Those that
average over a window are not raised before there is a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from hydra_ppo.algorithms.trends import mann_kendall
from hydra_ppo.config.settings import MonitorSettings
from hydra_ppo.training.over_optimisation import Evaluation, find_sign, stands_still

WATCHED = ("reward/length_r2", "policy/entropy", "value/explained_variance", "reward/head/spread")
"""Metrics of steps that alarms average over."""


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        name: of `config.monitor.ALARMS`.
        line: what was seen, and what to do.
        values: the numbers in it.
    """

    name: str
    line: str
    values: dict[str, float | None]


@dataclass
class Watch:
    """The history that alarms look back over.

    Attributes:
        steps: the last values of each of `WATCHED`, at most a window of each.
        entropy: of the policy when it was first measured, nats per token.
        first, best: evaluations, of before training, and the one with the highest mean of the evaluators.
        recent: the last evaluations, at most a window.
        tried: evaluations so far.
        flat: evaluations in a row at which the score rose over a window and the evaluators did not.
        on: alarms whose sign was there at the last look.
        seen: the last step at which the sign of each alarm was there.
        raised: all alarms so far, by name and step.

    Memory: for every prompt two numbers of a window's evaluations, and of two more, on the host.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    entropy: float | None = None
    first: Evaluation | None = None
    best: Evaluation | None = None
    recent: list[Evaluation] = field(default_factory=list)
    tried: int = 0
    flat: int = 0
    on: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    raised: list[dict[str, Any]] = field(default_factory=list)

    def copy(self) -> Watch:
        """Return a history that can look on by itself; evaluations are shared, since nobody changes them."""
        return replace(self, steps=dict(self.steps), raised=list(self.raised))

    def save(self) -> dict[str, Any]:
        """Return the history as plain values."""
        return asdict(self)

    @classmethod
    def load(cls, saved: Mapping[str, Any]) -> Watch:
        """Return the history that `save` gave."""
        found = cls(**saved)
        found.first, found.best = (None if one is None else Evaluation(**one) for one in (saved["first"], saved["best"]))
        found.recent = [Evaluation(**one) for one in saved["recent"]]
        return found

    def look(
        self,
        settings: MonitorSettings,
        step: int,
        metrics: Mapping[str, float | None],
        found: Mapping[str, Any],
        rows: int,
        keep: bool = True,
    ) -> list[Alarm]:
        """Take in a step, and return the alarms that it raises.

        Args:
            settings: what is watched.
            step: its number, 0 before training.
            metrics: of the step.
            found: of its evaluation; {} without one.
            rows: responses of a step.
            keep: whether the evaluation becomes part of the history; one that is made only because the run ends does not, so
                that a longer run sees what one of that length from the start sees.
        """
        if not settings.enabled:
            return []
        for name in WATCHED:
            value = metrics.get(name)
            if value is not None:
                self.steps[name] = [*self.steps.get(name, []), value][-settings.window :]
        if self.entropy is None:
            self.entropy = metrics.get("policy/entropy")
        signs = {"length": _length, "kl": _kl, "entropy": _entropy, "explained_variance": _explained}
        signs |= {"ratio": _ratio, "spread": _spread}
        alarms = [alarm for name, sign in signs.items() if (alarm := sign(self, settings, metrics, rows)) is not None]
        if "independent" in found:
            evaluation = Evaluation(step, list(found["scores"]), list(found["independent"]))
            alarms += self._evaluated(settings, evaluation, keep)
        elif "over_optimisation" in self.on:  # until the next evaluation
            alarms.append(Alarm("over_optimisation", "", {}))
        raised = [alarm for alarm in alarms if step - self.seen.get(alarm.name, -math.inf) > settings.window]
        self.on = [alarm.name for alarm in alarms]
        self.seen = self.seen | dict.fromkeys(self.on, step)
        self.raised += [{"step": step, "name": alarm.name} for alarm in raised]
        return raised

    def _evaluated(self, settings: MonitorSettings, now: Evaluation, keep: bool) -> list[Alarm]:
        recent = [*self.recent, now][-settings.window :]
        flat = self.flat + 1 if stands_still(recent, settings.window, settings.significance) else 0
        sign = None
        if self.first is not None and self.best is not None:
            sign = find_sign(self.first, self.best, self.tried, recent, settings.window, flat, settings.significance)
        if keep:
            self.first = self.first or now
            self.best = now if self.best is None or now.means[1] > self.best.means[1] else self.best
            self.recent, self.flat, self.tried = recent, flat, self.tried + 1
        if sign is None:
            return []
        (before, after), (judged, now_judged) = sign.proxy, sign.independent
        p = "" if sign.p is None else f", p = {sign.p:.2g}"
        line = (
            f"since step {sign.since} the score went from {before:.4g} to {after:.4g}, and eval/independent from {judged:.4g} "
            f"to {now_judged:.4g} ({sign.kind}{p}): training raises what its reward pays for and no longer what was meant; "
            f"take the checkpoint next to step {sign.best}, raise kl.coef, or train the reward model on this policy's answers"
        )
        values = {"since": sign.since, "best": sign.best, "p": sign.p, "score": after, "independent": now_judged}
        return [Alarm("over_optimisation", line, values)]


Sign = Callable[[Watch, MonitorSettings, Mapping[str, "float | None"], int], "Alarm | None"]


def _window(watch: Watch, settings: MonitorSettings, name: str) -> list[float] | None:
    """Return the last values of a metric; None until there is a window of them."""
    values = watch.steps.get(name, [])
    return values if len(values) >= settings.window else None


def _length(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    """Where R² is measured on few responses it is above 0 by chance, by 1 / (rows - 1); so it is corrected for that."""
    values = _window(watch, settings, "reward/length_r2")
    if settings.length_r2 is None or values is None or rows < 3:
        return None
    found = math.fsum(1 - (1 - value) * (rows - 1) / (rows - 2) for value in values) / len(values)
    if found <= settings.length_r2:
        return None
    line = (
        f"log length explains {found:.0%} of the score's variance over {len(values)} steps (reward/length_r2, corrected for "
        "the number of responses): answers may grow or shrink for the score's sake; look at samples.jsonl, and train the "
        "reward model on pairs of like length"
    )
    return Alarm("length", line, {"length_r2": found})


def _kl(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    found = metrics.get("objective/kl")
    if settings.kl_budget is None or found is None or found <= settings.kl_budget:
        return None
    line = (
        f"objective/kl={found:.4g} nats per response is above monitor.kl_budget={settings.kl_budget:g}; raise kl.coef, or take "
        "an earlier checkpoint"
    )
    return Alarm("kl", line, {"kl": found})


def _entropy(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    values, first = _window(watch, settings, "policy/entropy"), watch.entropy
    if settings.entropy_share is None or values is None or first is None or first <= 0:
        return None
    found = math.fsum(values) / len(values)
    if found >= settings.entropy_share * first:
        return None
    line = (
        f"policy/entropy is {found:.3g} nats per token over {len(values)} steps, {found / first:.0%} of the {first:.3g} it "
        "was: the policy says nearly the same to everything; raise entropy_coef or kl.coef, or lower "
        "optimizer.learning_rate"
    )
    return Alarm("entropy", line, {"entropy": found, "first": first})


def _explained(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    """The median, since one rollout of nearly equal returns has a share of minus many."""
    values, limit = _window(watch, settings, "value/explained_variance"), settings.explained_variance
    if limit is None or values is None or (found := median(values)) >= limit:
        return None
    line = (
        f"value/explained_variance is {found:.3g} (median of {len(values)} steps), below {limit:g}: the critic is worse than a "
        "constant, so advantages are noise; raise critic_learning_rate or critic_warmup_steps"
    )
    return Alarm("explained_variance", line, {"explained_variance": found})


def _ratio(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    largest, clipped = metrics.get("policy/ratio_max"), metrics.get("policy/clip_frac_max")
    said = []
    if settings.ratio_max is not None and largest is not None and largest > settings.ratio_max:
        said.append(f"policy/ratio_max={largest:.3g} is above {settings.ratio_max:g}")
    if settings.clip_share is not None and clipped is not None and clipped > settings.clip_share:
        said.append(f"policy/clip_frac_max={clipped:.3g} is above {settings.clip_share:g}")
    if not said:
        return None
    remedy = "an update moves the policy too far at once; lower optimizer.learning_rate or ppo_epochs, or set target_kl"
    return Alarm("ratio", f"{' and '.join(said)}: {remedy}", {"ratio_max": largest, "clip_frac_max": clipped})


def _spread(watch: Watch, settings: MonitorSettings, metrics: Mapping[str, float | None], rows: int) -> Alarm | None:
    values = _window(watch, settings, "reward/head/spread")
    if not settings.spread or values is None or mann_kendall(values).p_up > settings.significance:
        return None
    line = (
        f"reward/head/spread rose from {values[0]:.3g} to {values[-1]:.3g} over {len(values)} steps: the ensemble's members "
        "agree less and less on what the policy says; trust the score less, raise kl.coef, or label answers of this policy"
    )
    return Alarm("spread", line, {"spread": values[-1], "before": values[0]})
