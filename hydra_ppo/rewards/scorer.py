"""What the score of a response is made of: sources by name, their weighted sum, normalising and penalties."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hydra_ppo.config.rewards import RewardSettings, RewardSource
from hydra_ppo.errors import HydraError, RewardError
from hydra_ppo.model.origin import Origin, check_origin
from hydra_ppo.rewards.classifier import Classifier as _Classifier
from hydra_ppo.rewards.classifier import check_classifier
from hydra_ppo.rewards.ensembles import disagreement_parts, head_scores
from hydra_ppo.rewards.functions import FunctionSource, place_of, what_it_said
from hydra_ppo.rewards.isolated import FunctionFailed, IsolatedFunction
from hydra_ppo.rewards.numbers import Judgement, checked_numbers
from hydra_ppo.rewards.responses import Responses, columns_of
from hydra_ppo.rewards.server import Server
from hydra_ppo.rewards.stored_heads import HeadSource
from hydra_ppo.runtime.interruption import StopRequested, stopping_at_once
from hydra_ppo.runtime.time_limit import TimeLimitExceeded, time_limit

logger = logging.getLogger(__name__)

Isolation = Literal["process", "thread"]


class Source(Protocol):
    """What scores responses, beside the reward head.

    Attributes:
        remedy: what to do where it raises.
    """

    remedy: str

    def check(self, columns: Collection[str]) -> None:
        """Refuse rows that lack what it needs; raises ConfigError."""

    def __call__(self, responses: Responses, /) -> Any:
        """Return one number per response, or such numbers by the names of parts."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of responses.

    Attributes:
        total: the weighted sum of the sources, one number per response.
        parts: what each source says by itself, its weight left out, by name; parts of a source are `name/part`, and so is what
            it only shows, as `name/spread` of several heads.
    """

    total: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, float]]:
        """Return the parts of each response."""
        return [{name: values[row] for name, values in self.parts.items()} for row in range(len(self.total))]


@dataclass
class RunningMoments:
    """Mean and variance of all scores seen so far (Chan et al. 1979, parallel update)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: Sequence[float]) -> None:
        """Take in more values."""
        n = len(values)
        mean = sum(values) / n
        m2 = sum((v - mean) ** 2 for v in values)
        delta, total = mean - self.mean, self.count + n
        self.m2 += m2 + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation; 1 until there are two different values."""
        return math.sqrt(self.m2 / self.count) if self.count > 1 and self.m2 > 0 else 1.0


class Scorer:
    """Adds up the reward sources, then normalises, clips and penalises as the settings say.

    Args:
        settings: sources and treatment.
        device: where classifiers live. Memory: each classifier once.
        asks: whether this process asks the sources; where there are several, one does, and the others are told.

    Attributes:
        names: what metrics and samples call each source.

    Raises:
        ConfigError: when a function or a classifier cannot be found.
    """

    def __init__(self, settings: RewardSettings, device: torch.device, asks: bool = True) -> None:
        self.settings = settings
        self.moments = RunningMoments()
        self.names = settings.names
        self._sources = [_load(source, device, settings.isolation) for source in settings.sources] if asks else []

    @property
    def needs_head(self) -> bool:
        """Whether the model's own reward head is one of the sources."""
        return any(source.kind == "head" and source.target is None for source in self.settings.sources)

    @property
    def needs_states(self) -> bool:
        """Whether heads of another folder are a source, which read the states that the model's own head reads."""
        return any(source.kind == "head" and source.target is not None for source in self.settings.sources)

    @property
    def heads(self) -> dict[str, HeadSource]:
        """Those sources by name; empty in a process that does not ask."""
        sources = zip(self.names, self._sources, strict=False)
        return {name: source for name, source in sources if isinstance(source, HeadSource)}

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows that lack a column which a source needs, before anything is sampled.

        Args:
            rows: the columns of each beside prompt and answers; none at all is nothing to check.

        Raises:
            ConfigError: naming source and column.
        """
        if rows:
            columns = columns_of(rows)
            for source in self._sources:
                if source is not None and not isinstance(source, HeadSource):
                    source.check(columns)

    def check_origin(self, now: Origin) -> None:
        """Refuse heads that were trained on states of another model, and log where the base is only held otherwise.

        Args:
            now: what the states that they will be given come of.

        Raises:
            ConfigError: naming the source and what differs.
        """
        for name, source in self.heads.items():
            note = check_origin(source.heads.origin, now, f"reward source {name}, target={source.source.target!r},")
            if note is not None:
                logger.warning(note)

    def raw(self, head: Sequence[float], prompts: Sequence[str], responses: Sequence[str], where: str) -> list[float]:
        """Return the weighted sum for texts that nothing else is known of; see `score`."""
        return self.score(head, Responses.of_text(prompts, responses), where).total

    def score(
        self,
        head: Sequence[float],
        responses: Responses,
        where: str,
        members: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Scores:
        """Return the weighted sum of the sources, one number per response, and what each source says.

        Args:
            head: the reward head's scores, used where it is a source.
            responses: what the other sources are given.
            where: step and phase, for error messages.
            members: (B, k) of a reward head that has several; how far they are apart is told as parts that are not added up.
            states: (N, H) the reward role's states where scores are read, where `needs_states`.

        Raises:
            RewardError: when a source raises, or returns anything but one number per response.
            NonFiniteError: when a number is NaN or infinite.
            ConfigError: when a function takes what there is not.
        """
        total = [0.0] * len(responses)
        parts: dict[str, list[float]] = {}
        for settings, short, source in zip(self.settings.sources, self.names, self._sources, strict=True):
            name = _described(settings)
            found: Any
            if isinstance(source, HeadSource):
                if states is None:
                    raise RewardError(f"{where}: {name} reads states, and none were given; score with the model at hand.")
                found = source(states, responses.prompts)
            else:
                found = head_scores(settings, head, members) if source is None else self._asked(source, name, responses, where)
            values, pieces = _summed(found, len(responses), name, where)
            parts[short] = values
            pieces |= disagreement_parts(members) if source is None else {}
            parts |= {f"{short}/{piece}": numbers for piece, numbers in pieces.items()}
            total = [sum_ + settings.weight * value for sum_, value in zip(total, values, strict=True)]
        return Scores(total, parts)

    def _asked(self, source: Source, name: str, responses: Responses, where: str) -> Any:
        limit = self.settings.time_limit
        try:
            with stopping_at_once():
                if isinstance(source, IsolatedFunction):
                    return source(responses, limit)
                with time_limit(limit):
                    return source(responses)
        except TimeLimitExceeded:
            raise RewardError(
                f"{where}: {name} took over reward.time_limit={limit:g} s; {source.remedy} or raise the limit, then go on with "
                "--resume."
            ) from None
        except HydraError as error:
            raise type(error)(f"{where}: {error}") from error
        except FunctionFailed as error:
            raise RewardError(f"{where}: {name} {error}; {source.remedy}.") from error
        except (KeyboardInterrupt, StopRequested):
            raise
        except BaseException as error:  # sys.exit() too, which would end the run as if all were well
            raise RewardError(f"{where}: {name} {what_it_said(error)}{place_of(error)}; {source.remedy}.") from error

    def shape(self, raw: Sequence[float], ended: Sequence[bool]) -> list[float]:
        """Return the scores that PPO sees: normalised, clipped, then penalised where the end token is missing."""
        scores = list(raw)
        if self.settings.score_normalization:
            self.moments.update(scores)
            scores = [(s - self.moments.mean) / self.moments.std for s in scores]
        if (bound := self.settings.score_clip) is not None:
            scores = [min(max(s, -bound), bound) for s in scores]
        penalty = self.settings.missing_eos_penalty
        return [s if done else s - penalty for s, done in zip(scores, ended, strict=True)]


def check_origins(scorers: Sequence[Scorer], now: Callable[[], Origin]) -> bool:
    """Refuse heads that were trained on states of another model; return whether any scorer reads states.

    Args:
        scorers: all that are asked.
        now: finds what the states that they will be given come of; called where there are heads.

    Raises:
        ConfigError: as `Scorer.check_origin`.
    """
    for scorer in scorers:
        if scorer.heads:
            scorer.check_origin(now())
    return any(scorer.needs_states for scorer in scorers)


def check_source(source: RewardSource, isolation: Isolation = "process") -> None:
    """Refuse a source that cannot be used, before a weight is read and anything is asked.

    Args:
        source: the source.
        isolation: where functions run.

    Raises:
        ConfigError: as `Scorer` would.
    """
    if source.kind == "classifier":
        check_classifier(source)
    else:
        _load(source, torch.device("cpu"), isolation)


def check_columns(settings: RewardSettings, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that lack a column which a function or server takes, before a weight is read.

    Args:
        settings: the sources.
        rows: the columns of each beside prompt and answers; none at all is nothing to check.

    Raises:
        ConfigError: naming source and column.
    """
    for source in settings.sources if rows else ():
        if source.kind in ("function", "http"):
            made = _load(source, torch.device("cpu"), settings.isolation)
            if made is not None and not isinstance(made, HeadSource):
                made.check(columns_of(rows))


def _described(source: RewardSource) -> str:
    kind = {"http": "server"}.get(source.kind, source.kind)
    return kind if source.target is None else f"{kind} {source.target}"


def _summed(found: Any, count: int, name: str, where: str) -> tuple[list[float], dict[str, list[float]]]:
    """Return a source's numbers, and those of its parts where it names some, or of what it shows beside them."""
    if isinstance(found, Judgement):
        beside = {piece: checked_numbers(values, count, f"{name}, {piece},", where) for piece, values in found.beside.items()}
        return checked_numbers(found.values, count, name, where), beside
    if not isinstance(found, Mapping):
        return checked_numbers(found, count, name, where), {}
    if not found or not all(isinstance(piece, str) for piece in found):
        raise RewardError(
            f"{where}: {name} returned a {type(found).__name__} with the keys {sorted(map(repr, found))}; it must name parts, "
            "each a list of one number per response."
        )
    pieces = {piece: checked_numbers(values, count, f"{name}, part {piece!r},", where) for piece, values in found.items()}
    return [math.fsum(numbers) for numbers in zip(*pieces.values(), strict=True)], pieces


def _load(source: RewardSource, device: torch.device, isolation: Isolation) -> Source | HeadSource | None:
    """Return a source, None for the model's own reward head."""
    if source.kind == "head":
        return None if source.target is None else HeadSource(source, device)
    assert source.target is not None
    if source.kind == "classifier":
        return _Classifier(source.target, device, source)
    if source.kind == "http":
        return Server(source)
    return IsolatedFunction(source.target) if isolation == "process" else FunctionSource(source.target)
