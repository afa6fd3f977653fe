"""Floor pairs: a chosen answer against one that is certainly worse, made from it for nothing.

Bad data that cost no label: Muslimani and Taylor 2024 (SDP, arXiv 2405.00746) train a reward model first on transitions of a
poor policy, with the lowest reward. Here they are pairs of answers to one prompt. A corruption works on token ids. The last
token of an answer, which ends it, stays at the end, and no corrupted answer is longer than the one that it is made of, so that
neither gives it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random

from hydra_ppo.config.settings import FloorKind
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError

KEPT = 0.3
"""Of an answer that is cut off, so much is left."""
PIECE = 8
"""Most tokens of a piece that changes its place, or that is said again."""

Ids = tuple[int, ...]


def truncated(answer: Ids) -> Ids | None:
    """Cut an answer off after three tenths of it, and end it there; None where nothing would be lost."""
    *body, last = answer
    kept = math.ceil(KEPT * len(body))
    return (*body[:kept], last) if kept < len(body) else None


def shuffled(answer: Ids, random: Random) -> Ids | None:
    """Put the pieces of an answer, three or more where it has the tokens, into another order; None where all are alike."""
    *body, last = answer
    size = min(PIECE, max(1, len(body) // 3))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    for _ in range(20):
        moved = [token for piece in random.sample(pieces, len(pieces)) for token in piece]
        if moved != body:
            return (*moved, last)
    return None


def repeated(answer: Ids, random: Random) -> Ids | None:
    """Say a piece of an answer again and again, from where it stands to the end; None where that changes nothing."""
    *body, last = answer
    if len(body) < 2:
        return None
    for _ in range(20):
        start = random.randrange(len(body) - 1)
        size = random.randint(1, min(PIECE, len(body) - 1 - start))
        piece = body[start : start + size]
        found = body[:start] + (piece * len(body))[: len(body) - start]
        if found != body:
            return (*found, last)
    return None


def random_tokens(answer: Ids, vocabulary: Sequence[int], random: Random) -> Ids | None:
    """Return as many tokens, drawn from a vocabulary, that are not the answer; None where there are no others."""
    *body, last = answer
    drawable = [token for token in vocabulary if token != last]
    if not body or not drawable:
        return None
    for _ in range(20):
        found = random.choices(drawable, k=len(body))
        if found != body:
            return (*found, last)
    return None


def other_prompt(row: PreferenceRow, rows: Sequence[PreferenceRow], random: Random) -> Ids | None:
    """Return the chosen answer to another prompt that is another answer; None where there is none in so many tries."""
    for _ in range(20):
        other = rows[random.randrange(len(rows))]
        if other.prompt_ids != row.prompt_ids and other.chosen_ids != row.chosen_ids:
            return other.chosen_ids
    return None


class FloorPairs:
    """Makes floor pairs of preference rows, by number: the same ones for the same rows, kinds and seed, in any order.

    Args:
        rows: whose chosen answers are used.
        kinds: of corruptions; each pair gets one.
        seed: draws rows, kinds and corruptions.

    Raises:
        ConfigError: where one of the kinds changes no answer at all.
    """

    def __init__(self, rows: Sequence[PreferenceRow], kinds: Sequence[FloorKind], seed: int) -> None:
        self._rows, self._kinds, self._seed = rows, list(kinds), seed
        # What real answers are made of: every token that a model has would bring in those that no text has.
        self._vocabulary = sorted({i for row in rows for i in row.chosen_ids}) if "random-tokens" in kinds else []
        for kind in kinds:
            if all(self._corrupted(row, kind, Random(seed)) is None for row in rows):
                raise ConfigError(f"floor_kinds={self._kinds}: {kind!r} changes no answer of data.train; leave it out.")

    def __getitem__(self, number: int) -> PreferenceRow:
        """Return the pair of that number: its chosen answer is one of the rows', its rejected one is never equal to that."""
        random = Random(f"floor pair {number} of seed {self._seed}")
        kind = random.choice(self._kinds)
        first = random.randrange(len(self._rows))
        for step in range(len(self._rows)):
            row = self._rows[(first + step) % len(self._rows)]
            answer = self._corrupted(row, kind, random)
            if answer is not None:
                return PreferenceRow(row.prompt_text, row.chosen_text, "", row.prompt_ids, row.chosen_ids, answer, margin=0.0)
        raise ConfigError(f"floor_kinds={self._kinds}: {kind!r} changes hardly an answer of data.train; leave it out.")

    def _corrupted(self, row: PreferenceRow, kind: FloorKind, random: Random) -> Ids | None:
        """Return another answer than the row's chosen one; None where this kind makes none of it."""
        makers: Mapping[FloorKind, Callable[[], Ids | None]] = {
            "other-prompt": lambda: other_prompt(row, self._rows, random),
            "truncated": lambda: truncated(row.chosen_ids),
            "shuffled": lambda: shuffled(row.chosen_ids, random),
            "repeated": lambda: repeated(row.chosen_ids, random),
            "random-tokens": lambda: random_tokens(row.chosen_ids, self._vocabulary, random),
        }
        return makers[kind]()
