"""Reads preference pairs for commands that compare answers, those without a label too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.columns import Columns
from hydra_ppo.data.rows import Loaded, PreferenceRow, load_preferences
from hydra_ppo.data.sources import open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELLED = "labelled"
"""Column of a row whose `false` says that the order of its two answers is none of quality."""


@dataclass(frozen=True)
class Pairs:
    """Pairs as tokens, and as they came.

    Attributes:
        loaded: tokenised.
        rows: the same as rows of prompt, chosen and rejected, with what other columns they had.
    """

    loaded: Loaded[PreferenceRow]
    rows: list[dict[str, Any]]

    def labelled(self) -> list[bool]:
        """Return for each pair whether its order is a label."""
        return [row.get(LABELLED) is not False for row in self.rows]

    def notes(self, source: str) -> list[str]:
        """Say how many rows are used, and why others are left out or cut."""
        seen = len(self.rows) + self.loaded.skipped
        used = f"{source}: {len(self.rows)} of {seen} rows are used"
        without = self.labelled().count(False)
        first = [f"{used}, {without} of them without a label" if without else used]
        return first + [f"{source}: {count} of {seen} rows: {reason}" for reason, count in self.loaded.reasons.items()]


def load_pairs(source: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Pairs:
    """Read and tokenise pairs; a row of a prompt and a list of two `responses` is a pair without a label.

    Raises:
        DataError: as `load_preferences`.
    """
    opened = open_source(source, settings.split)
    columns = Columns(settings.columns, "preferences")
    first = next(open_source(source, settings.split).rows, (0, None))[1]
    first = columns.rename(first)
    if _is_pair(first) or (settings.format == "pairs" and _is_open(first)):
        settings = replace(settings, format="pairs")  # whatever form the run's own data had

    def renamed() -> Iterator[tuple[int, Any]]:
        for number, raw in opened.rows:
            row = columns.rename(raw)
            if settings.format == "pairs" and _is_open(row):
                one, other = row["responses"]
                rest = {name: value for name, value in row.items() if name != "responses"}
                row = rest | {"chosen": one, "rejected": other, LABELLED: False}
            yield number, row

    kept: list[dict[str, Any]] = []
    changed = replace(opened, rows=renamed())
    loaded = load_preferences(changed, tokenizer, settings, keep=lambda row: kept.append(dict(row)))
    return Pairs(loaded, kept)


def _is_pair(row: Any) -> bool:
    return isinstance(row, Mapping) and row.get("chosen") is not None and row.get("rejected") is not None


def _is_open(row: Any) -> bool:
    """Say whether a row holds two answers that nobody has compared."""
    if not isinstance(row, Mapping) or _is_pair(row):
        return False
    responses = row.get("responses")
    return isinstance(responses, (list, tuple)) and len(responses) == 2
