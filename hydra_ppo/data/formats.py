"""Takes a row apart into prompt and responses: the formats of TRL and of Anthropic's HH."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hydra_ppo.config.settings import TEMPLATE_OPTIONS
from hydra_ppo.data.boundaries import find_boundary, last_turns
from hydra_ppo.data.sources import Rejected

Messages = list[dict[str, Any]]
Conversation = str | Messages


class ChatText(str):
    """Messages as a chat template wrote them; the text remembers them, for readers that have a template of their own.

    Attributes:
        messages: what was rendered.
    """

    messages: Messages

    def __new__(cls, text: str, messages: Messages) -> ChatText:
        made = super().__new__(cls, text)
        made.messages = messages
        return made

    def __getnewargs__(self) -> tuple[str, Messages]:  # type: ignore[override]  # str takes one, and is copied by it
        return str(self), self.messages


TEXT_COLUMNS = ("prompt", "chosen", "rejected", "messages")
"""Columns that hold a conversation; what else a row has is handed to reward functions."""


class TextPair(NamedTuple):
    """A prompt and two continuations of its text; `rejected_prompt` where rejected answers another one."""

    prompt: str
    chosen: str
    rejected: str
    rejected_prompt: str | None = None
    notes: tuple[str, ...] = ()


class ChatPair(NamedTuple):
    """The messages of a prompt, and those of two answers; `rejected_prompt` where rejected answers another one."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    rejected_prompt: Messages | None = None
    notes: tuple[str, ...] = ()


Pair = TextPair | ChatPair


def checked_pair(row: Any, strict: bool = False, header: str = "") -> Pair:
    """Return prompt, chosen and rejected of a preference row, each answer the last turn of the assistant alone.

    Where the conversations part before their last turn, what lies between is context: of each answer its own.

    Args:
        strict: count equal and empty answers, which public sets have, as malformed.
        header: what the tokenizer's chat template writes between a question and its answer.

    Raises:
        Rejected: with the reason why the row cannot be used.
    """
    pair = _split_pair(row, header)
    _check_prompt(pair.prompt)
    _check_response("chosen", pair.chosen, strict)
    _check_response("rejected", pair.rejected, strict)
    if pair.chosen == pair.rejected:
        raise Rejected("chosen equals rejected", malformed=strict)
    if _changed(str.strip, pair.chosen) == _changed(str.strip, pair.rejected):
        raise Rejected("chosen and rejected are the same but for spaces around them", malformed=strict)
    pair = _last_turns(pair, header)
    _check_response("chosen", pair.chosen, strict)
    _check_response("rejected", pair.rejected, strict)
    if _changed(_squeezed, pair.chosen) == _changed(_squeezed, pair.rejected):
        pair = pair._replace(notes=(*pair.notes, "chosen and rejected differ in spaces and line breaks alone"))
    return pair


def _last_turns(pair: Pair, header: str) -> Pair:
    if isinstance(pair, TextPair):
        first, second = last_turns(pair.prompt, (pair.chosen, pair.rejected), header)
        if not first and not second:
            return pair
        (before, chosen), (other, rejected) = (
            (answer[:at], answer[at:]) for answer, at in ((pair.chosen, first), (pair.rejected, second))
        )
        return TextPair(pair.prompt + before, chosen, rejected, pair.prompt + other, pair.notes)
    (earlier, last), (others, final) = ((answer[:-1], answer[-1:]) for answer in (pair.chosen, pair.rejected))
    if not earlier and not others:
        return pair
    return ChatPair([*pair.prompt, *earlier], last, final, [*pair.prompt, *others], pair.notes)


def checked_prompt(row: Any, header: str = "") -> tuple[Conversation, tuple[str, ...]]:
    """Return the prompt of a prompt row or preference row, and notes on how it was found.

    A row with `messages` in place of `prompt` asks with those up to the last answer.

    Args:
        header: as of `checked_pair`.

    Raises:
        Rejected: with the reason why the row cannot be used.
    """
    has = {name for name in TEXT_COLUMNS if isinstance(row, Mapping) and row.get(name) is not None}
    notes: tuple[str, ...] = ()
    if {"chosen", "rejected"} <= has:
        pair = _split_pair(row, header)
        prompt, notes = pair.prompt, pair.notes
    elif "messages" in has and "prompt" not in has:
        prompt = _field(row, "messages")
        if isinstance(prompt, str):
            raise Rejected("messages is text, not a list of messages")
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        if not prompt:
            raise Rejected("messages holds answers alone")
    else:
        prompt = _field(row, "prompt")
    _check_prompt(prompt)
    return prompt, notes


def template_options(row: Any) -> dict[str, Any]:
    """Return what a row hands to the chat template: its `tools` and what its `chat_template_kwargs` hold.

    Raises:
        Rejected: where they are not of that form.
    """
    options: dict[str, Any] = {}
    for name, kind, what in (("chat_template_kwargs", dict, "an object"), ("tools", list, "a list")):
        value = row.get(name) if isinstance(row, Mapping) else None
        if isinstance(value, str):  # hub datasets hold what differs from row to row as JSON
            try:
                value = json.loads(value or "null")
            except (ValueError, RecursionError):
                raise Rejected(f"{name} is not valid JSON") from None
        if value is None:
            continue
        if not isinstance(value, kind):
            raise Rejected(f"{name} is not {what}")
        value = _without_nulls(value)
        if value:
            options |= value if name == "chat_template_kwargs" else {name: value}
    if reserved := next((name for name in options if name in TEMPLATE_OPTIONS), None):
        raise Rejected(f"chat_template_kwargs sets {reserved}, which is not the template's")
    return options


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Parquet and hub datasets put where another row has a key."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _split_pair(row: Any, header: str) -> Pair:
    """Take prompt and responses apart; all three come out of one kind, text or messages."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_text(_given_prompt(row), chosen, rejected, header)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(_given_prompt(row), chosen, rejected)
    raise Rejected("one of chosen and rejected is text, the other messages")


def _given_prompt(row: Mapping[str, Any]) -> Conversation | None:
    # Parquet and hub datasets hold null for an absent key.
    return None if row.get("prompt") is None else _field(row, "prompt")


def _split_text(prompt: Conversation | None, chosen: str, rejected: str, header: str) -> Pair:
    if prompt is None:
        shared = chosen[: _common_length(chosen, rejected)]
        cut, note = find_boundary(shared, header)
        _require_shared(shared[:cut].strip())
        return TextPair(chosen[:cut], chosen[cut:], rejected[cut:], notes=(note,))
    if isinstance(prompt, list):
        return ChatPair(prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}])
    # A response may begin like its prompt by accident ("Hi" - "Hi there"); both do only where the prompt is repeated.
    if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
        return TextPair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    return TextPair(prompt, chosen, rejected)


def _split_messages(prompt: Conversation | None, chosen: Messages, rejected: Messages) -> ChatPair:
    if isinstance(prompt, list):
        return ChatPair(prompt, _without_prefix(chosen, prompt), _without_prefix(rejected, prompt))
    # UltraFeedback has whole conversations beside the text of the question.
    if prompt is not None and chosen[0]["role"] == "assistant":
        return ChatPair([{"role": "user", "content": prompt}], chosen, rejected)
    cut = _common_length(chosen[:-1], rejected[:-1])  # the last message is never the prompt's
    _require_shared(chosen[:cut])
    return ChatPair(chosen[:cut], chosen[cut:], rejected[cut:])


def _require_shared(prompt: Conversation) -> None:
    if not prompt:
        raise Rejected("prompt is missing, and chosen and rejected share none")


def _without_prefix(messages: Messages, prefix: Messages) -> Messages:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # halving compares slices, which is a thousand times faster on long texts than item by item
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _changed(change: Callable[[str], str], answer: Conversation) -> Conversation:
    """Return an answer with its text, or that of each message, changed."""
    return change(answer) if isinstance(answer, str) else [m | {"content": change(m["content"])} for m in answer]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _field(row: Any, name: str) -> Conversation:
    if not isinstance(row, Mapping):
        raise Rejected("not an object")
    value = row.get(name)
    if value is None:
        raise Rejected(f"{name} is missing", missing=name)
    if isinstance(value, str):
        return checked_unicode(name, value)
    if isinstance(value, Mapping) and "role" in value:  # one message alone
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise Rejected(f"{name} is neither text nor a list of messages")
    if not value:
        raise Rejected(f"{name} is empty")
    return [_message(name, message) for message in value]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Rejected(f"{name} has a message that is not an object")
    # Parquet and hub datasets hold null for keys that only some messages have.
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        message["content"] = "".join(_part(name, part) for part in content)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _without_nulls(calls)
        message.setdefault("content", "")  # templates add it to text, which takes no null
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Rejected(f"{name} has a message without a text {key}")
        checked_unicode(name, message[key])
    return message


def _part(name: str, part: Any) -> str:
    """Return the text of a part of a message's content."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind is None:
        raise Rejected(f"{name} has a part of a message that is not an object")
    if kind != "text":
        raise Rejected(f"{name} has a part of type {str(kind)[:20]!r}; only text can be read")
    if not isinstance(part.get("text"), str):
        raise Rejected(f"{name} has a part of a message without a text")
    return str(part["text"])


def checked_unicode(name: str, text: str) -> str:
    """Return the text if tokenizers take it; raises Rejected otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise Rejected(f"{name} is not valid Unicode") from None
    return text


def _check_prompt(prompt: Conversation) -> None:
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not any(text.strip() for text in texts):
        raise Rejected("prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Rejected("prompt ends with an assistant message")


def _check_response(name: str, response: Conversation, strict: bool) -> None:
    last = {"content": response} if isinstance(response, str) else response[-1] if response else {}
    if not last.get("content", "").strip() and not last.get("tool_calls"):
        raise Rejected(f"{name} is empty", malformed=strict)
    if isinstance(response, list) and not response[0]["role"] == response[-1]["role"] == "assistant":
        raise Rejected(f"{name} does not start and end with an assistant message")
