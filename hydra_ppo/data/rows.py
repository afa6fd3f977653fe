"""Prompts and preference pairs from JSONL, JSON, CSV, Parquet, a hub dataset or any iterable of dicts.

Rows have the formats of TRL and of Anthropic's HH: ``prompt``, ``chosen`` and ``rejected``, each plain text or
chat messages, the prompt given or shared by the two responses; or lists of responses. Reading and checking need no tokenizer
(`check_source`); `load_preferences` and `load_prompts` add one. A row that cannot be used is rejected with a
reason, the reasons are counted over the whole source, and only then is there an error or a dropped row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.columns import Columns, Kind, margin_of, pair_rows
from hydra_ppo.data.ends import find_ends
from hydra_ppo.data.formats import TEXT_COLUMNS, ChatText, Messages, checked_pair, checked_prompt, template_options
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
        margin: how much better chosen is said to be; None where that was not asked for.
    """

    prompt_text: str
    chosen_text: str
    rejected_text: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    rejected_prompt_text: str | None = None
    rejected_prompt_ids: tuple[int, ...] | None = None
    margin: float | None = field(default=None, repr=False)  # which a digest of rows takes in by itself, where there is one

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
    """What a source held: usable rows, how many were left out, and counts of why rows were left out or cut.

    Attributes:
        read: rows of the source; fewer than `rows` and `skipped` together where each holds several pairs.
    """

    rows: list[Row]
    skipped: int
    reasons: dict[str, int]
    read: int = 0


def load_preferences(
    source: DataSource | Source,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    split: str | None = None,
    now: datetime | None = None,
    keep: Callable[[Mapping[str, Any]], None] = lambda row: None,
    margins: bool = False,
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
        keep: given each row that is used, under our names, in the order of the result.
        margins: read the margin of each pair; a row without one is malformed then.

    Raises:
        DataError: the source cannot be read, has malformed rows (unless ``skip_bad_rows``) or no usable row,
            or has chat messages and the tokenizer no chat template.
        ConfigError: nothing ends an answer.
    """
    codec = Codec(tokenizer, settings, now)
    longest = settings.max_response_tokens

    def convert(raw: Any, place: str) -> tuple[PreferenceRow, list[str]]:
        pair = checked_pair(raw, settings.degenerate_pairs == "error", codec.header)
        margin = margin_of(raw) if margins else None
        options = template_options(raw)
        prompt = codec.prompt(pair.prompt, place, options)
        other = prompt if pair.rejected_prompt is None else codec.prompt(pair.rejected_prompt, place, options)
        answers = [codec.answer("chosen", prompt, pair.chosen), codec.answer("rejected", other, pair.rejected)]
        notes = [*pair.notes, *prompt.notes]
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
        text, ids = (None, None) if other is prompt else (other.text, other.ids)
        keep(raw)
        return PreferenceRow(*texts, prompt.ids, chosen, rejected, text, ids, margin), notes

    return collect_rows(open_source(source, split or settings.split), convert, settings, "preferences")


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
        conversation, notes = checked_prompt(raw, codec.header)
        prompt = codec.prompt(conversation, place, template_options(raw))
        columns = {name: value for name, value in raw.items() if name not in TEXT_COLUMNS}
        text = prompt.text if prompt.messages is None else ChatText(prompt.text, prompt.messages)
        return PromptRow(text, prompt.ids, prompt.messages, columns), [*notes, *prompt.notes]

    return collect_rows(open_source(source, split or settings.split), convert, settings, "prompts")


def check_source(
    source: DataSource,
    kind: Kind,
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
    degenerate: Literal["drop", "error"] = "error" if strict else "drop"
    settings = DataSettings(train="unused", skip_bad_rows=skip_bad_rows, degenerate_pairs=degenerate)
    checked = check_rows(source, kind, settings, split=split, limit=limit)
    return len(checked.rows) + checked.skipped


def check_rows(
    source: DataSource,
    kind: Kind,
    settings: DataSettings,
    *,
    split: str | None = None,
    limit: int | None = None,
    margins: bool = False,
) -> Loaded[Hashable]:
    """Check the format of rows without a tokenizer; return for each usable one what `split_held_out` keeps together.

    Args:
        settings: columns, formats, and what is done with rows that cannot be used.
        split: of a hub dataset; None is ``settings.split``.
        limit: most rows to read; None reads all.
        margins: count preference rows without a margin as malformed.

    Raises:
        DataError: as `load_preferences` does.
    """
    strict = settings.degenerate_pairs == "error"

    def check(raw: Any, place: str) -> tuple[Hashable, list[str]]:
        if kind == "preferences":
            checked_pair(raw, strict)
            if margins:
                margin_of(raw)
        template_options(raw)
        prompt, _ = checked_prompt(raw)
        return prompt_key(prompt if isinstance(prompt, str) else repr(prompt)), []

    opened = open_source(source, split or settings.split)
    return collect_rows(replace(opened, rows=islice(opened.rows, limit)), check, settings, kind)


def split_held_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out ones, the same way for the same seed; both keep the order of ``rows``.

    All rows of one prompt (`prompt_key`) come to the same side, so the fraction is met as nearly as that allows. One above 0
    holds out at least one prompt, and one at least stays to train on; a single prompt stays.

    Raises:
        ConfigError: for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"eval_fraction={fraction!r} must lie in [0, 1); choose for example 0.05.")
    groups: dict[Hashable, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(i)
    held_out = _drawn(list(groups.values()), min(len(rows) * fraction, len(rows) - 1), random.Random(seed))
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def _drawn(groups: Sequence[list[int]], wanted: float, random_source: random.Random) -> set[int]:
    """Draw whole groups that hold about as many rows as wanted, but not all groups; some where wanted is above 0."""
    if wanted <= 0 or len(groups) < 2:
        return set()
    count = max(round(wanted), 1)
    best: list[int] = []
    for _ in range(20):  # large groups may leave no near sum in one order, and leave one in another
        first = random_source.sample(range(len(groups)), min(count, len(groups)))
        rest = sorted(set(range(len(groups))) - set(first))
        random_source.shuffle(rest)
        drawn: list[int] = []
        chosen = 0
        for i in [*first, *rest]:
            nearer = abs(len(drawn) + len(groups[i]) - count) < abs(len(drawn) - count)
            if nearer and chosen < len(groups) - 1:
                drawn += groups[i]
                chosen += 1
            if len(drawn) == count:
                return set(drawn)
        drawn = drawn or min(groups, key=len)  # the smallest is more than twice what is wanted
        if not best or abs(len(drawn) - count) < abs(len(best) - count):
            best = drawn
    return set(best)


def repeats(rows: Sequence[PreferenceRow | PromptRow]) -> dict[str, int]:
    """Count the rows that say what an earlier one says, and the pairs that say the opposite, by what is to be said of them."""
    seen: set[Hashable] = set()
    found: Counter[str] = Counter()
    this: Hashable
    swapped: Hashable
    for row in rows:
        if isinstance(row, PromptRow):
            this = swapped = row.ids
        else:
            chosen, rejected = (row.prompt_ids, row.chosen_ids), (row.before_rejected, row.rejected_ids)
            this, swapped = (chosen, rejected), (rejected, chosen)
        if this in seen:
            found["the prompt of an earlier row" if isinstance(row, PromptRow) else "the same as an earlier row"] += 1
        elif swapped in seen:
            found["an earlier row has the same answers the other way round"] += 1
        seen.add(this)
    return dict(found)


def shared_prompts(rows: Iterable[Any], held_out: Iterable[Any]) -> int:
    """Count the held-out rows whose prompt is one of `rows` too; see `prompt_key`."""
    known = {prompt_key(row) for row in rows}
    return sum(prompt_key(row) in known for row in held_out)


def prompt_key(row: Any) -> Hashable:
    """Return what rows of one prompt have in common: its text but for spaces, its ids where it has none."""
    text = row if isinstance(row, str) else getattr(row, "prompt_text", getattr(row, "text", None))
    if text is None:
        return cast(Hashable, row)
    return " ".join(text.split()) or getattr(row, "prompt_ids", getattr(row, "ids", text))


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id that pads: the tokenizer's, else one that ends answers. Masks tell the two apart; nothing else may.

    The tokenizer stays as it came: one that is saved with its end as its pad makes other programs mask every end.

    Raises ConfigError where there is neither.
    """
    pad: int | None = tokenizer.pad_token_id
    return find_ends(tokenizer).turn if pad is None else pad


# Counting


def collect_rows(
    source: Source, convert: Callable[[Any, str], tuple[Row, list[str]]], settings: DataSettings, kind: Kind
) -> Loaded[Row]:
    """Turn the rows of a source into ours, and count why some are left out or cut; DataError as `load_preferences` says."""
    rows: list[Row] = []
    reasons: Counter[str] = Counter()
    skipped = bad = 0
    first = missing = ""
    columns = Columns(settings.columns, kind)
    numbers: set[int] = set()
    for number, raw in _renamed(source, columns, settings, kind):
        numbers.add(number)
        place = f"{source.unit} {number}"
        try:
            if isinstance(raw, Rejected):
                raise raw
            row, notes = convert(raw, f"{source.name}: {place}")
        except Rejected as rejected:
            skipped += 1
            reasons[rejected.reason] += 1
            missing = missing or rejected.missing or ""
            if rejected.malformed:
                bad += 1
                first = first or f"{place}: {rejected.reason}"
            continue
        rows.append(row)
        reasons.update(notes)
    unnamed = columns.unused() or (None if rows else columns.nothing())
    if unnamed is not None:
        raise DataError(f"{source.name}: {unnamed}")
    hint = columns.hint(missing) if missing else ""
    if bad and not settings.skip_bad_rows:
        are, them = ("is", "it") if bad == 1 else ("are", "them")
        raise DataError(
            f"{source.name}: {bad} of {len(rows) + skipped} rows {are} malformed; first at {first}{hint}; "
            f"fix {them} or set data.skip_bad_rows=true to drop {them}."
        )
    if not skipped and not rows:
        raise DataError(f"{source.name}: holds no rows; give at least one.")
    if not rows:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise DataError(
            f"{source.name}: none of {skipped} rows is usable ({why}){hint}; fix the rows or change the data settings."
        )
    return Loaded(rows, skipped, dict(reasons), len(numbers))


def _renamed(source: Source, columns: Columns, settings: DataSettings, kind: Kind) -> Iterator[tuple[int, Any]]:
    """Yield rows under our names, and the pairs of those that hold several; each with the number of its row."""
    for number, raw in source.rows:
        row = columns.rename(raw)
        if kind == "prompts":
            yield number, row
            continue
        for pair in pair_rows(row, settings.format, settings.pairs_per_prompt):
            yield number, pair
