"""Prompts and preference pairs from JSONL, JSON, Parquet, a hub dataset or any iterable of dicts.

Rows have the formats of TRL and of Anthropic's HH: ``prompt``, ``chosen`` and ``rejected``, each plain text or
chat messages, the prompt given or shared by the two responses. Reading and checking need no tokenizer
(`check_source`); `load_preferences` and `load_prompts` add one. A row that cannot be used is rejected with a
reason, the reasons are counted over the whole source, and only then is there an error or a dropped row.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from hydra_ppo.config import DataSettings
from hydra_ppo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")
Messages = list[dict[str, Any]]
Conversation = str | Messages
DataSource = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_HUB_NAME = re.compile(r"([\w-]+|[\w-][\w.-]*/[\w.-]+)(:[\w.-]+)?")
_HH_TURN = "\n\nAssistant:"
_COLUMNS = ("prompt", "chosen", "rejected")


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


class _Rejected(Exception):
    """A row that cannot be used; one that is not malformed is dropped without an error."""

    def __init__(self, reason: str, *, malformed: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.malformed = malformed


@dataclass(frozen=True)
class _Opened:
    """A source being read: rows with their numbers, a row that could not be decoded as a `_Rejected`."""

    name: str
    unit: Literal["line", "row"]
    rows: Iterator[tuple[int, Any]]


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
        prompt, chosen, rejected = _checked_pair(raw)
        prompt_text, prompt_ids, notes = _encode_prompt(prompt, tokenizer, settings, place)
        texts, ids = [], []
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            text = _render_response(name, prompt, prompt_text, response, tokenizer)
            response_ids = _encode_response(name, text, tokenizer)
            if len(response_ids) > settings.max_response_tokens:
                notes.append(f"{name} cut to data.max_response_tokens={settings.max_response_tokens}")
            texts.append(text)
            ids.append(tuple(response_ids[: settings.max_response_tokens]))
        if ids[0] == ids[1]:
            raise _Rejected("chosen and rejected have the same tokens", malformed=False)
        return PreferenceRow(prompt_text, *texts, prompt_ids, *ids), notes

    return _collect(_open(source, split or settings.split), convert, settings.skip_bad_rows)


def load_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, split: str | None = None
) -> Loaded[PromptRow]:
    """Read and tokenise prompts; preference rows count too, for their prompt.

    ``split`` (of a hub dataset) defaults to ``settings.split``. The tokenizer is not changed. Raises what
    `load_preferences` raises.
    """
    _require_eos(tokenizer)

    def convert(raw: Any, place: str) -> tuple[PromptRow, list[str]]:
        text, ids, notes = _encode_prompt(_checked_prompt(raw), tokenizer, settings, place)
        return PromptRow(text, ids), notes

    return _collect(_open(source, split or settings.split), convert, settings.skip_bad_rows)


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
    check = {"preferences": _checked_pair, "prompts": _checked_prompt}[kind]
    opened = _open(source, split)
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


def _collect(source: _Opened, convert: Callable[[Any, str], tuple[Row, list[str]]], skip_bad_rows: bool) -> Loaded[Row]:
    rows: list[Row] = []
    reasons: Counter[str] = Counter()
    skipped = bad = 0
    first = ""
    for number, raw in source.rows:
        place = f"{source.unit} {number}"
        try:
            if isinstance(raw, _Rejected):
                raise raw
            row, notes = convert(raw, f"{source.name}: {place}")
        except _Rejected as rejected:
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


# Reading


def _open(source: DataSource, split: str) -> _Opened:
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise DataError(f"source={source!r} holds no rows; give a file, a hub dataset or an iterable of dicts.")
        return _Opened("examples", "row", enumerate(source, 1))
    name = os.fspath(source)
    path = Path(name).expanduser()
    readers = {".json": _read_json, ".parquet": _read_parquet}
    if not name or not path.exists():
        if path.suffix in (".jsonl", *readers) or not _HUB_NAME.fullmatch(name):
            raise DataError(f"{name or repr(name)}: no such file; check the path.")
        hub_path, _, config = name.partition(":")
        return _Opened(name, "row", enumerate(_read_dataset(name, hub_path, config or None, split), 1))
    if path.is_dir():
        return _Opened(name, "row", enumerate(_read_dataset(name, str(path), None, split), 1))
    if path.suffix == ".jsonl":
        return _Opened(name, "line", _read_jsonl(name, path))
    if path.suffix in readers:
        return _Opened(name, "row", enumerate(readers[path.suffix](name, path), 1))
    raise DataError(f"{name}: files of type {path.suffix!r} are not supported; use .jsonl, {' or '.join(readers)}.")


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be read ({_one_line(error)}); check or rewrite the file.")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _not_utf8(name: str, line: int) -> DataError:
    return DataError(f"{name}: line {line} is not valid UTF-8; save the file as UTF-8.")


def _read_jsonl(name: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise _not_utf8(name, number) from None
                if text.strip():
                    yield number, _parse_json(text)
    except OSError as error:
        raise _unreadable(name, error) from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for integers of thousands of digits
        return _Rejected("not valid JSON")


def _read_json(name: str, path: Path) -> Iterator[Any]:
    try:
        content = path.read_bytes()
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(name, content.count(b"\n", 0, error.start) + 1) from None
    except OSError as error:
        raise _unreadable(name, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: is not valid JSON ({_one_line(error)}); fix it, or name it .jsonl if it holds one object per line."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{name}: does not hold a list; write a list of objects, or one object per line in a .jsonl file.")
    yield from rows


def _read_parquet(name: str, path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [column for column in file.schema_arrow.names if column in _COLUMNS]
            if not columns:
                raise DataError(f"{name}: has none of the columns {', '.join(_COLUMNS)}; rename its columns.")
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, error) from error


def _read_dataset(name: str, path: str, config: str | None, split: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(path, config, split=split)
    except Exception as error:  # what the hub client, the builders and the readers raise has no common base
        raise DataError(
            f"{name}: cannot be loaded as a dataset with split {split!r} ({_one_line(error)}); "
            "check the path or name, the split and the connection."
        ) from error


# Formats


def _checked_pair(row: Any) -> tuple[Conversation, Conversation, Conversation]:
    prompt, chosen, rejected = _split_pair(row)
    _check_prompt(prompt)
    _check_response("chosen", chosen)
    _check_response("rejected", rejected)
    if chosen == rejected:
        raise _Rejected("chosen equals rejected")
    return prompt, chosen, rejected


def _checked_prompt(row: Any) -> Conversation:
    is_pair = isinstance(row, Mapping) and row.get("chosen") is not None and row.get("rejected") is not None
    prompt = _split_pair(row)[0] if is_pair else _field(row, "prompt")
    _check_prompt(prompt)
    return prompt


def _split_pair(row: Any) -> tuple[Conversation, Conversation, Conversation]:
    """Take prompt and responses apart; all three come out of one kind, text or messages."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if type(chosen) is not type(rejected):
        raise _Rejected("one of chosen and rejected is text, the other messages")
    if row.get("prompt") is None:  # Parquet and hub datasets hold null for an absent key
        return _split_implicit(chosen, rejected)
    prompt = _field(row, "prompt")
    if isinstance(prompt, list) and isinstance(chosen, str):
        return prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}]
    if isinstance(prompt, str) and isinstance(chosen, list):
        if chosen[0]["role"] != "assistant":  # UltraFeedback: whole conversations beside the text of the question
            return _split_implicit(chosen, rejected)
        return [{"role": "user", "content": prompt}], chosen, rejected
    if isinstance(prompt, list):
        return prompt, _without_prefix(chosen, prompt), _without_prefix(rejected, prompt)
    # A response may begin like its prompt by accident ("Hi" - "Hi there"); both do only where the prompt is repeated.
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _without_prefix(messages: Messages, prefix: Messages) -> Messages:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def _split_implicit(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, Conversation, Conversation]:
    if isinstance(chosen, str):
        cut = _text_boundary(chosen[: _common_length(chosen, rejected)])
    else:  # the last message is never the prompt's
        cut = _common_length(chosen[:-1], rejected[:-1])
    if not chosen[:cut]:
        raise _Rejected("prompt is missing, and chosen and rejected share none")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _text_boundary(common: str) -> int:
    """Return where the prompt ends: after HH's last "Assistant:", else at the last whitespace."""
    turn = common.rfind(_HH_TURN)
    if turn >= 0:
        return turn + len(_HH_TURN)
    end = next((i for i in range(len(common), 0, -1) if common[i - 1].isspace()), 0)
    # Tokenizers count a space to the word after it.
    return end - 1 if end and common[end - 1] == " " else end


def _field(row: Any, name: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise _Rejected("not an object")
    value = row.get(name)
    if value is None:
        raise _Rejected(f"{name} is missing")
    if isinstance(value, str):
        return _unicode(name, value)
    if not isinstance(value, (list, tuple)):
        raise _Rejected(f"{name} is neither text nor a list of messages")
    if not value:
        raise _Rejected(f"{name} is empty")
    return [_message(name, message) for message in value]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _Rejected(f"{name} has a message that is not an object")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise _Rejected(f"{name} has a message without a text {key}")
        _unicode(name, message[key])
    # Parquet and hub datasets hold null for keys that only some messages have.
    return {key: value for key, value in message.items() if value is not None}


def _unicode(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise _Rejected(f"{name} is not valid Unicode") from None
    return text


def _check_prompt(prompt: Conversation) -> None:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not any(text.strip() for text in texts):
        raise _Rejected("prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise _Rejected("prompt ends with an assistant message")


def _check_response(name: str, response: Conversation) -> None:
    if not response or not (response if isinstance(response, str) else response[-1]["content"]).strip():
        raise _Rejected(f"{name} is empty")
    if isinstance(response, list) and not response[0]["role"] == response[-1]["role"] == "assistant":
        raise _Rejected(f"{name} does not start and end with an assistant message")


# Tokens


def _encode_prompt(
    prompt: Conversation, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, place: str
) -> tuple[str, tuple[int, ...], list[str]]:
    """Return text, ids and notes of a prompt; chat is rendered up to where the assistant's answer begins."""
    is_chat = isinstance(prompt, list)
    if is_chat and not tokenizer.chat_template:
        raise DataError(
            f"{place} holds chat messages, but the tokenizer has no chat template; "
            "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text."
        )
    text = _render(tokenizer, prompt, add_generation_prompt=True) if is_chat else prompt
    ids = _encode("prompt", text, tokenizer, add_special_tokens=not is_chat)
    while not is_chat and ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it
        ids.pop()
    start = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    if ids == start:
        raise _Rejected("prompt has no tokens")
    limit = settings.max_prompt_tokens
    if len(ids) <= limit:
        return text, tuple(ids), []
    if settings.long_prompts != "truncate":
        raise _Rejected(
            f"prompt is over data.max_prompt_tokens={limit} (data.long_prompts={settings.long_prompts})",
            malformed=settings.long_prompts == "error",
        )
    if limit <= len(start):
        start = []
    return text, tuple(start + ids[len(ids) - limit + len(start) :]), [f"prompt cut to data.max_prompt_tokens={limit}"]


def _render_response(
    name: str, prompt: Conversation, prompt_text: str, response: Conversation, tokenizer: PreTrainedTokenizerBase
) -> str:
    if isinstance(response, str):
        return response
    whole = _render(tokenizer, [*prompt, *response], add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise _Rejected(f"the chat template does not render {name} as a continuation of its prompt")
    return whole[len(prompt_text) :]


def _encode_response(name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    body = text.rstrip()
    # Chat templates may put a newline after the EOS that ends a turn; a sampled response never has it.
    ids = _encode(name, body if body.endswith(tokenizer.eos_token) else text, tokenizer, add_special_tokens=False)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        raise _Rejected(f"{name} has no tokens")
    return [*ids, tokenizer.eos_token_id]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own and may raise anything
        raise _Rejected(f"the chat template refuses the messages ({_one_line(error)})") from error


def _encode(name: str, text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    _unicode(name, text)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
