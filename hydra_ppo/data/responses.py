"""Prompts with given responses, for whoever wants a score of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.formats import Conversation, checked_prompt, template_options
from hydra_ppo.data.rows import Loaded, collect_rows
from hydra_ppo.data.sources import DataSource, Rejected, open_source
from hydra_ppo.data.text import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE_COLUMNS = ("response", "responses")


@dataclass(frozen=True)
class ResponseRow:
    """A prompt and its responses: texts as tokenised (chat rendered), ids as a preference row would have them.

    Attributes:
        prompt_text, prompt_ids: the prompt.
        texts, ids: of each response.
        is_list: whether the row held a list of responses, and not one alone.
    """

    prompt_text: str
    prompt_ids: tuple[int, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    is_list: bool


def load_responses(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    split: str | None = None,
    now: datetime | None = None,
) -> Loaded[ResponseRow]:
    """Read and tokenise rows of `prompt` and `response`, or a list of `responses`, as `load_preferences` does with pairs.

    Each response is text or the messages of an answer. Arguments and errors as of `load_preferences`.
    """
    codec = Codec(tokenizer, settings, now)
    longest = settings.max_response_tokens

    def convert(raw: Any, place: str) -> tuple[ResponseRow, list[str]]:
        given, is_list = _responses(raw)
        conversation, notes = checked_prompt(raw, codec.header)
        if isinstance(conversation, str) and not isinstance(given[0], str):
            conversation = [{"role": "user", "content": conversation}]
        prompt = codec.prompt(conversation, place, template_options(raw))
        in_messages = not isinstance(conversation, str)
        answers = [codec.answer("response", prompt, _as_answer(response, in_messages)) for response in given]
        cut = [f"response cut to data.max_response_tokens={longest}" for answer in answers if len(answer.ids) > longest]
        ids = tuple(answer.ids[:longest] for answer in answers)
        row = ResponseRow(prompt.text, prompt.ids, tuple(answer.text for answer in answers), ids, is_list)
        return row, [*notes, *prompt.notes, *cut]

    return collect_rows(open_source(source, split or settings.split), convert, settings, "prompts")


def has_responses(row: Any) -> bool:
    """Say whether a row holds responses to score, and not a pair to compare."""
    if not isinstance(row, Mapping) or (row.get("chosen") is not None and row.get("rejected") is not None):
        return False
    return any(row.get(name) is not None for name in RESPONSE_COLUMNS)


def _responses(row: Any) -> tuple[list[Conversation], bool]:
    """Return the responses of a row, and whether they came as a list of several."""
    name = next((name for name in RESPONSE_COLUMNS if isinstance(row, Mapping) and row.get(name) is not None), None)
    if name is None:
        raise Rejected("response is missing", missing="response")
    value = row[name]
    several = isinstance(value, (list, tuple)) and not all(isinstance(item, Mapping) for item in value)
    given = list(value) if several else [value]
    for response in given:
        is_messages = isinstance(response, (list, tuple)) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in response
        )
        if not isinstance(response, str) and not is_messages:
            raise Rejected(f"{name} is neither text nor messages")
        if not response or not (response if isinstance(response, str) else response[-1]["content"]).strip():
            raise Rejected(f"{name} is empty", malformed=False)
    if len({isinstance(response, str) for response in given}) > 1:
        raise Rejected(f"some of {name} are text, others messages")
    return given, several


def _as_answer(response: Conversation, in_messages: bool) -> Conversation:
    """Return a response in the form of its prompt."""
    if isinstance(response, str) and in_messages:
        return [{"role": "assistant", "content": response}]
    return response if isinstance(response, str) else [dict(message) for message in response]
