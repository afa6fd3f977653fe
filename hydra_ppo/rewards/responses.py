"""What reward sources are given: responses with their prompts, as text and as messages, and the other columns of the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_ppo.data.formats import ChatText, Messages


@dataclass(frozen=True)
class Responses:
    """A batch of N responses; every list has one entry for each.

    Attributes:
        prompts: as the policy reads them, chat rendered.
        texts: what the responses say.
        conversations: the messages of each prompt; None where it came as text.
        columns: what else the row of each prompt holds.
        ended: whether the response ended by itself, and was not cut at its longest length.
        queries: prompt and response as the tokens spell them, special ones shown.
        begin: what the policy's tokenizer begins texts with, where it begins them with anything.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    conversations: Sequence[Messages | None]
    columns: Sequence[Mapping[str, Any]]
    ended: Sequence[bool]
    queries: Sequence[str]
    begin: str | None = None

    @classmethod
    def of_text(cls, prompts: Sequence[str], texts: Sequence[str]) -> Responses:
        """Return responses of which only texts are known: all ended, rendered prompts with the messages that they remember."""
        return cls(
            prompts=prompts,
            texts=texts,
            conversations=[prompt.messages if isinstance(prompt, ChatText) else None for prompt in prompts],
            columns=[{} for _ in prompts],
            ended=[True] * len(texts),
            queries=[prompt + text for prompt, text in zip(prompts, texts, strict=True)],
        )

    def __len__(self) -> int:
        return len(self.texts)

    def messages(self) -> list[Messages | None]:
        """Return each conversation with the response as the assistant's answer; new objects, which a function may change."""
        return [
            None if before is None else [*({**message} for message in before), {"role": "assistant", "content": text}]
            for before, text in zip(self.conversations, self.texts, strict=True)
        ]

    def column(self, name: str) -> list[Any]:
        """Return one column of the rows; None where a row lacks it."""
        return [row.get(name) for row in self.columns]


def columns_in_words(columns: Collection[str]) -> str:
    """Say which columns the data has, for errors."""
    return f"has the columns {', '.join(sorted(columns))}" if columns else "has no other columns"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the columns that any of the rows has."""
    return set().union(*rows)
