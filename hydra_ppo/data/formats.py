"""Takes a row apart into prompt and responses: the formats of TRL and of Anthropic's HH."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra_ppo.data.sources import Rejected

Messages = list[dict[str, Any]]
Conversation = str | Messages

_HH_TURN, _HH_USER = "\n\nAssistant:", "\n\nHuman:"

TEXT_COLUMNS = ("prompt", "chosen", "rejected", "messages")
"""Columns that hold a conversation; what else a row has is handed to reward functions."""


class TextPair(NamedTuple):
    """A prompt and two continuations of its text; `rejected_prompt` where rejected answers another one."""

    prompt: str
    chosen: str
    rejected: str
    rejected_prompt: str | None = None


class ChatPair(NamedTuple):
    """The messages of a prompt, and those of two answers; `rejected_prompt` where rejected answers another one."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    rejected_prompt: Messages | None = None


Pair = TextPair | ChatPair


def checked_pair(row: Any, strict: bool = False) -> Pair:
    """Return prompt, chosen and rejected of a preference row, each answer the last turn of the assistant alone.

    Where the conversations part before their last turn, what lies between is context: of each answer its own.

    Args:
        strict: count equal and empty answers, which public sets have, as malformed.

    Raises:
        Rejected: with the reason why the row cannot be used.
    """
    pair = _split_pair(row)
    _check_prompt(pair.prompt)
    _check_response("chosen", pair.chosen, strict)
    _check_response("rejected", pair.rejected, strict)
    if pair.chosen == pair.rejected:
        raise Rejected("chosen equals rejected", malformed=strict)
    return _last_turns(pair)


def _last_turns(pair: Pair) -> Pair:
    if isinstance(pair, TextPair):
        (before, chosen), (other, rejected) = (_last_text(text) for text in (pair.chosen, pair.rejected))
        if not before and not other:
            return pair
        return TextPair(pair.prompt + before, chosen, rejected, pair.prompt + other)
    (earlier, last), (others, final) = ((answer[:-1], answer[-1:]) for answer in (pair.chosen, pair.rejected))
    if not earlier and not others:
        return pair
    return ChatPair([*pair.prompt, *earlier], last, final, [*pair.prompt, *others])


def _last_text(answer: str) -> tuple[str, str]:
    """Cut an answer of HH's kind that holds turns of the user after the last "Assistant:"."""
    turn = answer.rfind(_HH_TURN)
    if turn < 0 or _HH_USER not in answer[:turn]:
        return "", answer
    turn += len(_HH_TURN)
    return answer[:turn], answer[turn:]


def checked_prompt(row: Any) -> Conversation:
    """Return the prompt of a prompt row or preference row; raises Rejected with the reason why it cannot be used."""
    is_pair = isinstance(row, Mapping) and row.get("chosen") is not None and row.get("rejected") is not None
    prompt = _split_pair(row).prompt if is_pair else _field(row, "prompt")
    _check_prompt(prompt)
    return prompt


def _split_pair(row: Any) -> Pair:
    """Take prompt and responses apart; all three come out of one kind, text or messages."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_text(_given_prompt(row), chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(_given_prompt(row), chosen, rejected)
    raise Rejected("one of chosen and rejected is text, the other messages")


def _given_prompt(row: Mapping[str, Any]) -> Conversation | None:
    # Parquet and hub datasets hold null for an absent key.
    return None if row.get("prompt") is None else _field(row, "prompt")


def _split_text(prompt: Conversation | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        cut = _text_boundary(chosen[: _common_length(chosen, rejected)])
        _require_shared(chosen[:cut])
        return TextPair(chosen[:cut], chosen[cut:], rejected[cut:])
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
        raise Rejected("not an object")
    value = row.get(name)
    if value is None:
        raise Rejected(f"{name} is missing")
    if isinstance(value, str):
        return checked_unicode(name, value)
    if not isinstance(value, (list, tuple)):
        raise Rejected(f"{name} is neither text nor a list of messages")
    if not value:
        raise Rejected(f"{name} is empty")
    return [_message(name, message) for message in value]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Rejected(f"{name} has a message that is not an object")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Rejected(f"{name} has a message without a text {key}")
        checked_unicode(name, message[key])
    # Parquet and hub datasets hold null for keys that only some messages have.
    return {key: value for key, value in message.items() if value is not None}


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
    if not response or not (response if isinstance(response, str) else response[-1]["content"]).strip():
        raise Rejected(f"{name} is empty", malformed=strict)
    if isinstance(response, list) and not response[0]["role"] == response[-1]["role"] == "assistant":
        raise Rejected(f"{name} does not start and end with an assistant message")
