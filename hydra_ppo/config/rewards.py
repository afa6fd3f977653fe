"""What the score of a response is made of, as settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from hydra_ppo.config.fields import Quantization, check, expand_home, not_negative, positive, setting
from hydra_ppo.errors import ConfigError

TAKEN = {"length_r2"}
"""What metrics call reward/... beside the sources."""


@dataclass(frozen=True)
class RewardSource:
    """One term of the score."""

    kind: Literal["head", "function", "classifier", "http"] = setting(
        "head",
        "The model's own reward head or heads of hydra-ppo heads, a Python function, a sequence classifier, or a server as "
        "OpenRLHF asks one.",
    )
    target: str | None = setting(
        None,
        "head: a folder of hydra-ppo heads, null is the model's own head; function: package.module:function; classifier: model "
        "name or folder; http: the address of the server.",
    )
    weight: float = setting(1.0, "Factor of this term in the sum; one of 0 is logged all the same.")
    name: str | None = setting(None, "What metrics and samples call it; null is the function's name, else the kind.")
    label: str | None = setting(
        None, "classifier: the label that is wanted, where it has several; http: the column of the rows that is sent as labels."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "classifier: compute type; auto is as of model.dtype.")
    quantization: Quantization | None = setting(None, "classifier: quantise its linear layers, int8, nf4 or fp4.")
    max_tokens: int | None = setting(
        None, "classifier: longer texts lose their beginning; null is what its tokenizer and config say."
    )
    batch_size: int | None = setting(
        None, "classifier: texts per pass, null is 16; http: responses per request, null is all of a batch."
    )
    timeout: float = setting(60.0, "http: seconds that a server may be silent.")
    retries: int = setting(4, "http: how often a request that failed is sent again, after 1, 2, 4, ... seconds.")
    aggregate: Literal["mean", "minimum", "variance", "lcb", "pessimism"] = setting(
        "mean",
        "head: what several reward heads say together: mean, minimum, mean - coef * variance, mean - coef * deviation (lcb); "
        "pessimism, of one-pass heads in target: the score - coef * uncertainty.",
    )
    aggregate_coef: float = setting(0.1, "head: the coef of variance, lcb and pessimism.")

    def __post_init__(self) -> None:
        if self.kind in ("classifier", "head"):
            expand_home(self, "target")
        check(
            self,
            "target",
            self.kind != "head" or self.target != "",
            "is no folder",
            "leave target out for the model's own head",
        )
        if self.kind == "http" and not (self.target or "").startswith(("http://", "https://")):
            raise ConfigError(f"target={self.target!r} is not the address of a server; write http://host:port/path.")
        if self.kind != "head" and not self.target:
            raise ConfigError(f"kind={self.kind!r} needs a target; give package.module:function or a model folder.")
        if self.kind == "function" and (self.target or "").count(":") != 1:
            raise ConfigError(f"target={self.target!r} is not of the form package.module:function; write it so.")
        self._check_kinds()
        positive(self, "max_tokens", "batch_size", "timeout")
        not_negative(self, "retries", "aggregate_coef")
        unread = self.aggregate in ("mean", "minimum") and self.aggregate_coef != RewardSource.aggregate_coef
        rule = f"has nothing to do with aggregate={self.aggregate!r}"
        check(self, "aggregate_coef", not unread, rule, "use aggregate='variance' or 'lcb', or leave aggregate_coef out")
        rule = "is not made of letters, digits, '.', '_' and '-'"
        named = self.name is None or re.fullmatch(r"[\w.-]+", self.name) is not None
        check(self, "name", named, rule, "choose a short name")

    def _check_kinds(self) -> None:
        """Refuse what another kind of source takes and this one would pass over."""
        taken = {"classifier": {"label", "dtype", "quantization", "max_tokens", "batch_size"}}
        taken["head"] = {"aggregate", "aggregate_coef"}
        taken["http"] = {"label", "batch_size", "timeout", "retries"}
        if self.kind == "head" and self.target is None and self.aggregate == "pessimism":
            raise ConfigError("aggregate='pessimism' needs one-pass heads; name a folder of hydra-ppo heads in target.")
        for member in fields(self):
            if member.name in ("kind", "target", "weight", "name") or member.name in taken.get(self.kind, ()):
                continue
            value = getattr(self, member.name)
            if value != member.default:
                raise ConfigError(f"{member.name}={value!r} does not go with kind={self.kind!r}; leave {member.name} out.")

    @property
    def short_name(self) -> str:
        """What it is called where `name` is not given and no other source is called so."""
        return self.name or (self.target or "").partition(":")[2] if self.kind == "function" else self.name or self.kind


@dataclass(frozen=True)
class RewardSettings:
    """What the score of a response is made of."""

    sources: list[RewardSource] = setting(lambda: [RewardSource()], "Terms of the score; their weighted values are added.")
    score_clip: float | None = setting(None, "Clip scores to [-score_clip, score_clip] (after normalisation).")
    score_normalization: bool = setting(
        False, "Divide scores by their running standard deviation after subtracting their running mean."
    )
    missing_eos_penalty: float = setting(
        0.0, "Subtracted from the score of a response that does not end with the end-of-sequence token."
    )
    time_limit: float | None = setting(600.0, "Seconds that a reward source may take over one batch; null waits for ever.")
    isolation: Literal["process", "thread"] = setting(
        "process",
        "Where functions run: a process of their own, which can be ended whatever they do, or that of the training, which they "
        "can then take down.",
    )

    def __post_init__(self) -> None:
        check(self, "sources", len(self.sources) > 0, "names no source", "give at least one")
        positive(self, "score_clip", "time_limit")
        not_negative(self, "missing_eos_penalty")
        check_names("sources", self.sources)

    @property
    def names(self) -> list[str]:
        """What metrics and samples call each source."""
        return names_of(self.sources)


def names_of(sources: Sequence[RewardSource]) -> list[str]:
    """Return what metrics and samples call each source: names as given; of others the second of a kind is kind-2."""
    given = {source.name for source in sources if source.name is not None}
    found: list[str] = []
    for source in sources:
        name, number = source.short_name, 1
        while source.name is None and (name in found or name in given):
            number += 1
            name = f"{source.short_name}-{number}"
        found.append(name)
    return found


def check_names(setting: str, sources: Sequence[RewardSource]) -> None:
    """Refuse a name that two sources have, or that a metric beside those of sources has.

    Raises:
        ConfigError: naming it.
    """
    given = [source.name for source in sources if source.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"{setting}: name={name!r} is given to {given.count(name)} of them; choose another for each.")
    if taken := TAKEN.intersection(names_of(sources)):
        raise ConfigError(f"{setting}: name={min(taken)!r} is that of the metric reward/{min(taken)}; choose another name.")


def check_evaluators(evaluators: Sequence[RewardSource], trained: Sequence[RewardSource]) -> None:
    """Refuse evaluators that have one name, and one that the policy is trained on: it could not see what training games.

    Args:
        evaluators: `eval_rewards`.
        trained: `reward.sources`.

    Raises:
        ConfigError: naming it.
    """
    check_names("eval_rewards", evaluators)
    for index, source in enumerate(evaluators):
        for other, used in enumerate(trained):
            if used.weight != 0 and (used.kind, used.target, used.label) == (source.kind, source.target, source.label):
                what = source.kind if source.target is None else f"{source.kind} {source.target}"
                raise ConfigError(
                    f"eval_rewards[{index}]: the {what} is reward.sources[{other}], which training raises, so it is not "
                    "independent; name another, or give that source weight 0."
                )
