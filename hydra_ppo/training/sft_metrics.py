"""What a step and an evaluation of joint SFT add up, and by which names they tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.training.metrics import Metrics
from hydra_ppo.training.pairs import is_floor


class PairSums(NamedTuple):
    """Sums over the pairs of one pass, each (): what was not computed is 0, or None.

    Attributes:
        nll: over the response tokens of the data's pairs.
        ranking, expected: losses of the reward model, over all pairs.
        correct, spread: over the data's pairs.
        floor_correct: over the floor pairs.
        margins: (B,) of each pair, those of the data first.
    """

    nll: Tensor
    ranking: Tensor
    correct: Tensor
    expected: Tensor | None = None
    spread: Tensor | None = None
    floor_correct: Tensor | None = None
    margins: Tensor | None = None

    def vector(self) -> Tensor:
        """Return the sums as one tensor, (6,), without a gradient."""
        zero = torch.zeros_like(self.nll)
        return torch.stack([zero if part is None else part.detach() for part in self[:COUNT]])


COUNT = 6
"""Sums in a vector of `PairSums`."""


class Counts(NamedTuple):
    """What sums are divided by: response tokens and pairs of the data, floor pairs."""

    tokens: int
    real: int
    floor: int

    @staticmethod
    def of(rows: Sequence[PreferenceRow]) -> Counts:
        """Count what some pairs hold."""
        real = [row for row in rows if not is_floor(row)]
        return Counts(sum(len(row.chosen_ids) for row in real), len(real), len(rows) - len(real))

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.real + self.floor


def named_sums(config: SFTConfig, sums: Sequence[float], counts: Counts, prefix: str) -> Metrics:
    """Return losses and measures by name from the sums of a step; what was not computed is None.

    Args:
        config: which losses there are.
        sums: as of `PairSums.vector`.
        counts: of all pairs that were added up.
        prefix: of the names of measures, train or eval.
    """
    nll, ranking, correct, expected, spread, floor_correct = sums
    nll = nll / counts.tokens if counts.tokens else 0.0
    ranking, expected = ranking / counts.pairs, expected / counts.pairs
    ranked, real = config.reward_coef > 0, counts.real
    found: Metrics = {
        "loss/total": config.sft_coef * nll + config.reward_coef * (ranking + expected),
        "loss/sft": nll if config.sft_coef and counts.tokens else None,
        "loss/reward": ranking if ranked else None,
        f"{prefix}/reward_accuracy": correct / real if ranked and real else None,
    }
    if config.reward_loss == "advantage":
        found["loss/expected"] = expected
    if config.reward_heads > 1:
        found[f"{prefix}/reward_spread"] = spread / real if real else None
    if config.has_floor and prefix == "train":
        found["train/floor_accuracy"] = floor_correct / counts.floor if counts.floor else None
    return found
