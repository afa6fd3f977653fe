"""Prompts and preference pairs from JSONL, JSON, Parquet, a hub dataset or any iterable of dicts.

Rows have the formats of TRL and of Anthropic's HH: ``prompt``, ``chosen`` and ``rejected``, each plain text or
chat messages, the prompt given or shared by the two responses. Reading and checking need no tokenizer
(`check_source`); `load_preferences` and `load_prompts` add one. A row that cannot be used is rejected with a
reason, the reasons are counted over the whole source, and only then is there an error or a dropped row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.ends import find_ends
from hydra_ppo.data.formats import TEXT_COLUMNS, Messages, checked_pair, checked_prompt
from hydra_ppo.data.sources import DataSource, Rejected, Source, open_source
from hydra_ppo.data.text import Codec
from hydra_ppo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")


@dataclass(frozen=True)
class PreferenceRow:
    """One pair: texts as tokenised (chat rendered), ids perhaps cut; an answer that is not cut ends in the end of a turn.

    Attributes:
        prompt_text, prompt_ids: what chosen answers; rejected too, but where conversations part before their last turn.
        rejected_prompt_text, rejected_prompt_ids: what rejected answers then; None where that is the same.
    """

    prompt_text: str
    chosen_text: str
    rejected_text: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    rejected_prompt_text: str | None = None
    rejected_prompt_ids: tuple[int, ...] | None = None

    @property
    def before_rejected(self) -> tuple[int, ...]:
        """Tokens of the prompt that rejected answers."""
        return self.prompt_ids if self.rejected_prompt_ids is None else self.rejected_prompt_ids


@dataclass(frozen=True)
class PromptRow:
    """One prompt: text as the policy reads it (chat rendered, perhaps cut) and its ids.

    Attributes:
        messages: the same as messages, where it came as such.
        columns: what else the row held, for reward functions.
    """

    text: str
    ids: tuple[int, ...]
    messages: Messages | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded(Generic[Row]):
    """What a source held: usable rows, how many were left out, and counts of why rows were left out or cut."""

    rows: list[Row]
    skipped: int
    reasons: dict[str, int]


def load_preferences(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    split: str | None = None,
    now: datetime | None = None,
) -> Loaded[PreferenceRow]:
    """Read and tokenise preference pairs.

    An answer ends where a rollout would (`Ends.turn`), and has at most ``max_response_tokens`` ids with that; a longer one is
    cut and carries no end. Pairs whose two answers come out with the same ids are dropped and counted.

    Args:
        source: see `open_source`.
        tokenizer: it is not changed.
        settings: lengths, formats, and what is done with rows that cannot be used.
        split: of a hub dataset; None is ``settings.split``.
        now: the time that chat templates see.

    Raises:
        DataError: the source cannot be read, has malformed rows (unless ``skip_bad_rows``) or no usable row,
            or has chat messages and the tokenizer no chat template.
        ConfigError: nothing ends an answer.
    """
    codec = Codec(tokenizer, settings, now)
    longest = settings.max_response_tokens

    def convert(raw: Any, place: str) -> tuple[PreferenceRow, list[str]]:
        pair = checked_pair(raw, strict=settings.degenerate_pairs == "error")
        prompt = codec.prompt(pair.prompt, place)
        other = prompt if pair.rejected_prompt is None else codec.prompt(pair.rejected_prompt, place)
        answers = [codec.answer("chosen", prompt, pair.chosen), codec.answer("rejected", other, pair.rejected)]
        notes = [*prompt.notes]
        if other is not prompt:
            notes += [*other.notes, "the conversations part before their last turn; each last answer is read after its own"]
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            if len(answer.ids) > longest:
                notes.append(f"{name} cut to data.max_response_tokens={longest}")
            if answer.crossing:
                notes.append(f"a token crosses from prompt to {name}; the answer is encoded as a rollout would draw it")
        chosen, rejected = (answer.ids[:longest] for answer in answers)
        if chosen == rejected and prompt.ids == other.ids:
            raise Rejected("chosen and rejected have the same tokens", malformed=False)
        texts = (prompt.text, answers[0].text, answers[1].text)
        own = (None, None) if other is prompt else (other.text, other.ids)
        return PreferenceRow(*texts, prompt.ids, chosen, rejected, *own), notes

    return _collect(open_source(source, split or settings.split), convert, settings.skip_bad_rows)


def load_prompts(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    split: str | None = None,
    now: datetime | None = None,
) -> Loaded[PromptRow]:
    """Read and tokenise prompts; preference rows count too, for their prompt. Arguments and errors as `load_preferences`."""
    codec = Codec(tokenizer, settings, now)

    def convert(raw: Any, place: str) -> tuple[PromptRow, list[str]]:
        prompt = codec.prompt(checked_prompt(raw), place)
        columns = {name: value for name, value in raw.items() if name not in TEXT_COLUMNS}
        return PromptRow(prompt.text, prompt.ids, prompt.messages, columns), list(prompt.notes)

    return _collect(open_source(source, split or settings.split), convert, settings.skip_bad_rows)


def check_source(
    source: DataSource,
    kind: Literal["preferences", "prompts"],
    limit: int | None = 1000,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    strict: bool = False,
) -> int:
    """Check the format of the first ``limit`` rows (None: all) without a tokenizer; return how many rows were seen.

    An iterator is consumed by as many rows; ``strict`` counts equal and empty answers as malformed. Raises DataError as
    `load_preferences` does.
    """
    check: Callable[[Any], object] = partial(checked_pair, strict=strict) if kind == "preferences" else checked_prompt
    opened = open_source(source, split)
    first = replace(opened, rows=islice(opened.rows, limit))
    loaded = _collect(first, lambda raw, place: (check(raw), []), skip_bad_rows)
    return len(loaded.rows) + loaded.skipped


def split_held_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out ones, the same way for the same seed; both keep the order of ``rows``.

    A fraction above 0 holds out at least one row, and one row at least stays to train on. Raises ConfigError
    for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"eval_fraction={fraction!r} must lie in [0, 1); choose for example 0.05.")
    count = min(max(round(len(rows) * fraction), int(fraction > 0)), max(len(rows) - 1, 0))
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id that pads: the tokenizer's, else one that ends answers. Masks tell the two apart; nothing else may.

    The tokenizer stays as it came: one that is saved with its end as its pad makes other programs mask every end.

    Raises ConfigError where there is neither.
    """
    pad: int | None = tokenizer.pad_token_id
    return find_ends(tokenizer).turn if pad is None else pad


# Counting


def _collect(source: Source, convert: Callable[[Any, str], tuple[Row, list[str]]], skip_bad_rows: bool) -> Loaded[Row]:
    rows: list[Row] = []
    reasons: Counter[str] = Counter()
    skipped = bad = 0
    first = ""
    for number, raw in source.rows:
        place = f"{source.unit} {number}"
        try:
            if isinstance(raw, Rejected):
                raise raw
            row, notes = convert(raw, f"{source.name}: {place}")
        except Rejected as rejected:
            skipped += 1
            reasons[rejected.reason] += 1
            if rejected.malformed:
                bad += 1
                first = first or f"{place}: {rejected.reason}"
            continue
        rows.append(row)
        reasons.update(notes)
    if bad and not skip_bad_rows:
        are, them = ("is", "it") if bad == 1 else ("are", "them")
        raise DataError(
            f"{source.name}: {bad} of {len(rows) + skipped} rows {are} malformed; first at {first}; "
            f"fix {them} or set data.skip_bad_rows=true to drop {them}."
        )
    if not skipped and not rows:
        raise DataError(f"{source.name}: holds no rows; give at least one.")
    if not rows:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise DataError(f"{source.name}: none of {skipped} rows is usable ({why}); fix the rows or change the data settings.")
    return Loaded(rows, skipped, dict(reasons))
