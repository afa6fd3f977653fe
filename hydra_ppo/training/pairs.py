"""Which preference pairs a step of reward training is made of, and which reward heads learn from each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import torch

from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.data.floor import FloorPairs
from hydra_ppo.data.rows import PreferenceRow


@dataclass(frozen=True)
class TrainingPair(PreferenceRow):
    """A pair as training takes it.

    Attributes:
        heads: which reward heads learn from it; None is all of them.
        floor: whether its rejected answer was made from its chosen one, which is then no answer to be learned by heart.
    """

    heads: tuple[bool, ...] | None = None
    floor: bool = False


class PairBatches:
    """The batches of a run, the same ones for the same settings and rows, wherever one begins to take them.

    The first `floor_steps` batches are floor pairs alone. Then each epoch goes through the rows in a fresh order, with the
    share of floor pairs beside them that the settings name. A pair is of the same heads whenever it comes.

    Args:
        rows: the training pairs.
        config: sizes, shares and seed.

    Raises:
        ConfigError: where floor pairs cannot be made of the rows.
    """

    def __init__(self, rows: Sequence[PreferenceRow], config: SFTConfig) -> None:
        self.rows, self.config = rows, config
        self.steps = config.steps(len(rows))
        self.floor = FloorPairs(rows, config.floor_kinds, config.run.seed) if config.has_floor else None

    def after(self, done: int) -> Iterator[list[TrainingPair]]:
        """Yield the batches of the steps after the first `done`."""
        numbers = self._numbers()
        for step in range(self.steps):
            first = step < self.config.floor_steps
            chosen = [] if first else next(numbers)
            if step >= done:
                floor = self.config.batch_size if first else self.config.floor_beside(len(chosen))
                yield [self._pair(number) for number in chosen] + self._floor_pairs(step, floor)

    def _numbers(self) -> Iterator[list[int]]:
        """Yield the numbers of the rows of each batch, for ever."""
        generator = torch.Generator().manual_seed(self.config.run.seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            for start in range(0, len(order), self.config.data_pairs):
                yield order[start : start + self.config.data_pairs]

    def _pair(self, number: int) -> TrainingPair:
        config = self.config
        heads = None
        if config.reward_heads > 1:
            heads = heads_of_pair(number, config.reward_heads, config.head_share, config.run.seed)
        return TrainingPair(**_values(self.rows[number]), heads=heads)

    def _floor_pairs(self, step: int, count: int) -> list[TrainingPair]:
        if count == 0 or self.floor is None:
            return []
        first = step * self.config.batch_size
        return [TrainingPair(**_values(self.floor[first + i]), floor=True) for i in range(count)]


def heads_of_pair(number: int, heads: int, share: float, seed: int) -> tuple[bool, ...]:
    """Draw which heads learn from a pair: each with probability `share`, and one at least.

    Args:
        number: of the pair in the training data.
        heads: how many there are.
        share: of the pairs that each is to see.
        seed: of the run.

    Returns:
        One bool per head, the same ones for the same arguments on every machine.
    """
    random = Random(f"heads of pair {number} of seed {seed}")
    drawn = [random.random() < share for _ in range(heads)]
    if not any(drawn):
        drawn[random.randrange(heads)] = True
    return tuple(drawn)


def real_first(rows: Sequence[PreferenceRow]) -> tuple[list[PreferenceRow], int]:
    """Return the pairs with those of the data before floor pairs, and how many are of the data."""
    real = [row for row in rows if not is_floor(row)]
    return real + [row for row in rows if is_floor(row)], len(real)


def is_floor(row: PreferenceRow) -> bool:
    """Say whether the pair's rejected answer was made on purpose."""
    return isinstance(row, TrainingPair) and row.floor


def longest(row: PreferenceRow) -> int:
    """Return the tokens of the longer of a pair's two sequences."""
    return max(len(row.prompt_ids) + len(row.chosen_ids), len(row.before_rejected) + len(row.rejected_ids))


def _values(row: PreferenceRow) -> dict[str, Any]:
    return {item.name: getattr(row, item.name) for item in fields(PreferenceRow)}
