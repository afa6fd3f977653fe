"""What the score of a response is made of: the reward head, Python functions, sequence classifiers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.config.settings import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, NonFiniteError, RewardError
from hydra_ppo.runtime.interruption import stopping_at_once
from hydra_ppo.runtime.time_limit import TimeLimitExceeded, time_limit

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


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

    Raises:
        ConfigError: when a function or a classifier cannot be found.
    """

    def __init__(self, settings: RewardSettings, device: torch.device) -> None:
        self.settings = settings
        self.moments = RunningMoments()
        self._sources: list[tuple[RewardSource, RewardFunction | None]] = [
            (source, _load(source, device)) for source in settings.sources
        ]

    @property
    def needs_head(self) -> bool:
        """Whether the model's own reward head is one of the sources."""
        return any(source.kind == "head" for source in self.settings.sources)

    def raw(self, head_scores: Sequence[float], prompts: Sequence[str], responses: Sequence[str], where: str) -> list[float]:
        """Return the weighted sum of the sources, one number per response.

        Args:
            head_scores: the reward head's, used where it is a source.
            prompts, responses: texts.
            where: step and phase, for error messages.

        Raises:
            RewardError: when a source raises, or returns anything but one number per response.
            NonFiniteError: when a number is NaN or infinite.
        """
        total = [0.0] * len(responses)
        for source, function in self._sources:
            name = source.kind if source.target is None else f"{source.kind} {source.target}"
            values = head_scores
            if function is not None:
                values = _call(function, name, prompts, responses, where, self.settings.time_limit)
            for row, value in enumerate(values):
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{where}: reward of {name} is {value} for response {row}; look at that response in samples.jsonl or "
                        "lower the learning rate."
                    )
                total[row] += source.weight * value
        return total

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


def _load(source: RewardSource, device: torch.device) -> RewardFunction | None:
    if source.kind == "head":
        return None
    assert source.target is not None
    if source.kind == "classifier":
        return _Classifier(source.target, device)
    return load_function(source.target)


def load_function(target: str) -> RewardFunction:
    """Import a reward function.

    Raises:
        ConfigError: when there is none of that name, or its module does not run.
    """
    module_name, function_name = target.split(":")
    # A console script does not have the working directory on its path; `python -m` does. Users expect it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module may raise anything
        raise ConfigError(
            f"reward target={target!r} cannot be imported ({type(error).__name__}: {error}); check module and function name, "
            "and run from the folder that holds the module."
        ) from error
    if not callable(function):
        raise ConfigError(f"reward target={target!r} is not callable; name a function over (prompts, responses).")
    return function


def _call(
    function: RewardFunction, name: str, prompts: Sequence[str], responses: Sequence[str], where: str, limit: float | None
) -> list[float]:
    try:
        with stopping_at_once(), time_limit(limit):
            values = function(list(prompts), list(responses))
    except TimeLimitExceeded:
        raise RewardError(
            f"{where}: {name} took over reward.time_limit={limit:g} s; mend the function or raise the limit, then go on with "
            "--resume."
        ) from None
    except Exception as error:
        raise RewardError(f"{where}: {name} raised {type(error).__name__}: {error}; mend the function.") from error
    if isinstance(values, Tensor):
        values = values.detach().flatten().tolist()
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{where}: {name} returned {type(values).__name__}; it must return one number per response."
        ) from error
    if len(numbers) != len(responses):
        raise RewardError(
            f"{where}: {name} returned {len(numbers)} numbers for {len(responses)} responses; it must return one for each."
        )
    return numbers


class _Classifier:
    """A sequence classifier as a reward: its logit, or the log-odds of label 1 of two."""

    ROWS = 16

    def __init__(self, target: str, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from hydra_ppo.compat import dtype_option

        options = {"use_safetensors": True, **dtype_option("auto")}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(target)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(target, **options).to(device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"reward target={target!r} cannot be loaded as a classifier: {reason}; name a model folder."
            ) from error
        if self.model.config.num_labels not in (1, 2):
            raise ConfigError(
                f"reward target={target!r} has {self.model.config.num_labels} labels; use a classifier with one label or two."
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        from hydra_ppo.compat import accepted_inputs

        scores: list[float] = []
        texts = [p + r for p, r in zip(prompts, responses, strict=True)]
        for start in range(0, len(texts), self.ROWS):
            inputs = self.tokenizer(texts[start : start + self.ROWS], return_tensors="pt", padding=True, truncation=True)
            logits = self.model(**accepted_inputs(self.model, inputs.to(self.model.device))).logits.float()
            scores += (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()
        return scores
