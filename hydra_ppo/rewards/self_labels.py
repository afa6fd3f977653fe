"""Self-evolved reward learning: heads label pairs that they are sure of, and learn from them, in rounds (arXiv 2411.00418)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hydra_ppo.model.origin import Origin
from hydra_ppo.rewards.features import read_pairs
from hydra_ppo.rewards.head_training import CHUNK, HeadTraining, LabelledPairs, train_heads
from hydra_ppo.rewards.stored_heads import StoredHeads

HIGH, LOW, GAP = 0.55, 0.45, 0.3
"""Bounds of the paper's two filters."""
USEFUL = 0.01
"""Share of the pairs without a label from which on a filter has found a useful number of them; the paper gives none."""

Status = Literal["easy", "hard", "stop"]


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        status: which filter chose.
        pool: pairs that had no label.
        kept: of those, how many the filter took.
        swapped: of those, how many have their second answer as the better one.
        accuracy, error: of the new heads on held-out labels, and its standard error.
        accepted: whether the heads and labels were taken.
    """

    status: Status
    pool: int
    kept: int
    swapped: int
    accuracy: float
    error: float
    accepted: bool


@dataclass(frozen=True)
class SelfLabelled:
    """What came of all rounds.

    Attributes:
        seed: heads trained on labels alone.
        heads: of the last round that was accepted; the seed's where none was.
        rounds: in order, refused ones too.
        labels: of pairs that were taken, the number of the round and whether the second answer is the better one.
    """

    seed: StoredHeads
    heads: StoredHeads
    rounds: list[Round]
    labels: dict[int, tuple[int, bool]]


def choose(first: Tensor, second: Tensor) -> tuple[Status, Tensor, Tensor]:
    """Return which filter a round uses, which pairs it takes, and of which the second answer is the better one.

    `easy` takes pairs of a good and a bad answer, p1 > .55 and p2 < .45 or the reverse, p the logistic of a score; where they
    are too few, `hard` takes those with |p1 - p2| >= .3; where those are too few, too, it is time to `stop`.

    Args:
        first, second: (N,) scores of the two answers, of heads whose mean score is 0.

    Returns:
        The status, (N,) bool and (N,) bool.
    """
    p, q = first.sigmoid(), second.sigmoid()
    easy = ((p > HIGH) & (q < LOW)) | ((q > HIGH) & (p < LOW))
    hard = (p - q).abs() >= GAP
    least = max(1, round(USEFUL * len(p)))
    for status, taken in (("easy", easy), ("hard", hard)):
        if int(taken.sum()) >= least:
            return ("easy" if status == "easy" else "hard"), taken, q > p
    return "stop", torch.zeros_like(easy), q > p


def accepts(accuracy: float, best: float, error: float) -> bool:
    """Say whether a round may count: its accuracy is not more than one standard error below the best before it."""
    return accuracy >= best - error


def self_label(
    states: np.ndarray,
    labelled: Sequence[int],
    held_out: Sequence[int],
    pool: Sequence[int],
    origin: Origin,
    training: HeadTraining,
    rounds: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> SelfLabelled:
    """Train heads on labels, let them label what they are sure of, train again on both, and so on.

    After arXiv 2411.00418: its two filters, its rule of which one a round uses, and training sets that grow from round to
    round. Its loss is a hinge with a margin; here as in its released code it is -log sigmoid. Added: the mean of several
    heads judges; held-out labels refuse a round that lowers accuracy by more than one standard error under the best before it
    (the error is that of the best), and a refused round is the last one, for the same heads would only choose the same pairs
    again. The same labels stop the training of all heads early, so that accuracies are a little high, for all rounds alike.

    Args:
        states: (N, 2, H) of all pairs.
        labelled: pairs whose first answer is the better one.
        held_out: more of them, which judge the rounds and are never learned from.
        pool: pairs whose order says nothing.
        origin: of the states.
        training: of the heads of each round.
        rounds: most rounds.
        tell: told of each round.

    Memory: as `train_heads`; scores of the pool.
    """
    swapped = np.zeros(len(states), dtype=bool)
    seed = train_heads(LabelledPairs(states), labelled, held_out, origin, training)
    heads, best = seed, (seed.measured["accuracy"], seed.measured["accuracy_se"])
    labels: dict[int, tuple[int, bool]] = {}
    done: list[Round] = []
    left = list(pool)
    for number in range(1, rounds + 1):
        if not left:
            break
        scores = _scores(heads, states, left)
        status, taken, second = choose(scores[:, 0], scores[:, 1])
        if status == "stop":
            tell(f"round {number}: the heads are sure of too few of {len(left):,} pairs; nothing more to label")
            break
        new = {left[i]: bool(second[i]) for i in taken.nonzero()[:, 0].tolist()}
        trial = swapped.copy()
        trial[[row for row, other in new.items() if other]] = True
        rows = [*labelled, *labels, *new]
        settings = replace(training, seed=training.seed + number)
        found = train_heads(LabelledPairs(states, trial), rows, held_out, origin, settings)
        accuracy, error = found.measured["accuracy"], found.measured["accuracy_se"]
        accepted = accepts(accuracy, *best)
        done.append(Round(status, len(left), len(new), sum(new.values()), accuracy, error, accepted))
        tell(in_words(number, done[-1], best[0]))
        if not accepted:
            break
        heads, swapped = found, trial
        labels |= {row: (number, other) for row, other in new.items()}
        left = [row for row in left if row not in new]
        best = max(best, (accuracy, error))
    return SelfLabelled(seed, heads, done, labels)


def in_words(number: int, made: Round, best: float) -> str:
    """Say what a round did."""
    verdict = "accepted" if made.accepted else f"refused: more than one standard error below {best:.4f}"
    return (
        f"round {number}: {made.status} pairs, {made.kept:,} of {made.pool:,} kept ({made.kept / made.pool:.1%}), "
        f"{made.swapped / made.kept:.1%} of them swapped, held-out accuracy {made.accuracy:.4f} +- {made.error:.4f}, {verdict}"
    )


def _scores(heads: StoredHeads, states: np.ndarray, rows: Sequence[int]) -> Tensor:
    """Return (n, 2) the mean of the heads for both answers of some pairs."""
    found = []
    for start in range(0, len(rows), CHUNK):
        both = read_pairs(states, rows[start : start + CHUNK])
        found.append(torch.stack([heads.members(part).mean(dim=1) for part in both], dim=1))
    return torch.cat(found)
