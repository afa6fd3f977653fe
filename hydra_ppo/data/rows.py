"""Prompts and preference pairs from JSONL, JSON, Parquet, a hub dataset or any iterable of dicts.

Rows have the formats of TRL and of Anthropic's HH: ``prompt``, ``chosen`` and ``rejected``, each plain text or
chat messages, the prompt given or shared by the two responses. Reading and checking need no tokenizer
(`check_source`); `load_preferences` and `load_prompts` add one. A row that cannot be used is rejected with a
reason, the reasons are counted over the whole source, and only then is there an error or a dropped row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.formats import Conversation, Messages, Pair, TextPair, checked_pair, checked_prompt, checked_unicode
from hydra_ppo.data.sources import DataSource, Rejected, Source, one_line, open_source
from hydra_ppo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")


@dataclass(frozen=True)
class PreferenceRow:
    """One pair: texts as tokenised (chat rendered) and whole; ids may be cut, and a response not cut ends in EOS."""

    prompt_text: str
    chosen_text: str
    rejected_text: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptRow:
    """One prompt: text as tokenised (chat rendered) and whole; ids may be cut."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Loaded(Generic[Row]):
    """What a source held: usable rows, how many were left out, and counts of why rows were left out or cut."""

    rows: list[Row]
    skipped: int
    reasons: dict[str, int]


def load_preferences(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, split: str | None = None
) -> Loaded[PreferenceRow]:
    """Read and tokenise preference pairs.

    A response has at most ``max_response_tokens`` ids, its EOS included; a longer one is cut and carries no EOS.
    Pairs whose two responses come out with the same ids are dropped and counted. ``split`` (of a hub dataset)
    defaults to ``settings.split``. The tokenizer is not changed.

    Raises:
        DataError: the source cannot be read, has malformed rows (unless ``skip_bad_rows``) or no usable row,
            or has chat messages and the tokenizer no chat template.
        ConfigError: the tokenizer has no EOS token.
    """
    _require_eos(tokenizer)

    def convert(raw: Any, place: str) -> tuple[PreferenceRow, list[str]]:
        pair = checked_pair(raw)
        prompt_text, prompt_ids, notes = _encode_prompt(pair.prompt, tokenizer, settings, place)
        texts: list[str] = []
        ids: list[tuple[int, ...]] = []
        for name, text in _responses(pair, prompt_text, tokenizer):
            response_ids = _encode_response(name, text, tokenizer)
            if len(response_ids) > settings.max_response_tokens:
                notes.append(f"{name} cut to data.max_response_tokens={settings.max_response_tokens}")
            texts.append(text)
            ids.append(tuple(response_ids[: settings.max_response_tokens]))
        if ids[0] == ids[1]:
            raise Rejected("chosen and rejected have the same tokens", malformed=False)
        return PreferenceRow(prompt_text, texts[0], texts[1], prompt_ids, ids[0], ids[1]), notes

    return _collect(open_source(source, split or settings.split), convert, settings.skip_bad_rows)


def load_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, split: str | None = None
) -> Loaded[PromptRow]:
    """Read and tokenise prompts; preference rows count too, for their prompt.

    ``split`` (of a hub dataset) defaults to ``settings.split``. The tokenizer is not changed. Raises what
    `load_preferences` raises.
    """
    _require_eos(tokenizer)

    def convert(raw: Any, place: str) -> tuple[PromptRow, list[str]]:
        text, ids, notes = _encode_prompt(checked_prompt(raw), tokenizer, settings, place)
        return PromptRow(text, ids), notes

    return _collect(open_source(source, split or settings.split), convert, settings.skip_bad_rows)


def check_source(
    source: DataSource,
    kind: Literal["preferences", "prompts"],
    limit: int | None = 1000,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
) -> int:
    """Check the format of the first ``limit`` rows (None: all) without a tokenizer; return how many rows were seen.

    An iterator is consumed by as many rows. Raises DataError as `load_preferences` does.
    """
    check = {"preferences": checked_pair, "prompts": checked_prompt}[kind]
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
    """Return the id that pads, making EOS the pad token where none is set; attention masks tell the two apart.

    Raises ConfigError where there is no EOS token.
    """
    _require_eos(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.pad_token_id


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer.eos_token=None leaves a response without an end; set eos_token in the model's tokenizer_config.json."
        )


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


# Tokens


def _encode_prompt(
    prompt: Conversation, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, place: str
) -> tuple[str, tuple[int, ...], list[str]]:
    """Return text, ids and notes of a prompt; chat is rendered up to where the assistant's answer begins."""
    if isinstance(prompt, str):
        text, ids = prompt, _encode("prompt", prompt, tokenizer, add_special_tokens=True)
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it
            ids.pop()
    elif tokenizer.chat_template:
        text = _render(tokenizer, prompt, add_generation_prompt=True)
        ids = _encode("prompt", text, tokenizer, add_special_tokens=False)
    else:
        raise DataError(
            f"{place} holds chat messages, but the tokenizer has no chat template; "
            "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text."
        )
    start = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    if ids == start:
        raise Rejected("prompt has no tokens")
    limit = settings.max_prompt_tokens
    if len(ids) <= limit:
        return text, tuple(ids), []
    if settings.long_prompts != "truncate":
        raise Rejected(
            f"prompt is over data.max_prompt_tokens={limit} (data.long_prompts={settings.long_prompts})",
            malformed=settings.long_prompts == "error",
        )
    if limit <= len(start):
        start = []
    return text, tuple(start + ids[len(ids) - limit + len(start) :]), [f"prompt cut to data.max_prompt_tokens={limit}"]


def _responses(pair: Pair, prompt_text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield name and text of chosen, then of rejected; the second is rendered only when it is asked for."""
    if isinstance(pair, TextPair):
        yield from (("chosen", pair.chosen), ("rejected", pair.rejected))
        return
    for name, messages in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = _render(tokenizer, [*pair.prompt, *messages], add_generation_prompt=False)
        if not whole.startswith(prompt_text):
            raise Rejected(f"the chat template does not render {name} as a continuation of its prompt")
        yield name, whole[len(prompt_text) :]


def _encode_response(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    body = text.rstrip()
    # Chat templates may put a newline after the EOS that ends a turn; a sampled response never has it.
    ids = _encode(name, body if body.endswith(tokenizer.eos_token) else text, tokenizer, add_special_tokens=False)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise Rejected(f"{name} has no tokens")
    return [*ids, tokenizer.eos_token_id]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own and may raise anything
        raise Rejected(f"the chat template refuses the messages ({one_line(error)})") from error
    return cast(str, text)  # its type says what there can be with tokenize=True, too


def _encode(name: str, text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    checked_unicode(name, text)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
