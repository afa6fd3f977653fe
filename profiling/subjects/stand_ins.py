"""What a trainer asks for and a measurement has no use for: a tokenizer, and settings of files that nobody reads or writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from hydra_ppo.config.settings import DataSettings, ModelSettings, RunSettings


class NoTokenizer:
    """Stands in for a tokenizer: texts do not matter, for the reward is the head's.

    Args:
        end_token: of a response. One that cannot be sampled, such as the first beyond the vocabulary, leaves every response
            its full length.
    """

    pad_token_id, bos_token_id, bos_token, eos_token, chat_template = 0, None, None, None, None
    all_special_ids = range(300_000)  # any id may be an end: none is a word

    def __init__(self, end_token: int) -> None:
        self.eos_token_id = end_token

    def get_vocab(self) -> dict[str, int]:
        """Return nothing: no id is known not to be a token."""
        return {}

    def convert_ids_to_tokens(self, token: int) -> str:
        """Return a name for a token."""
        return f"<{token}>"

    def batch_decode(self, responses: Sequence[Sequence[int]], **options: bool) -> list[str]:
        """Return an empty text for each response."""
        return [""] * len(responses)


def unused_settings(memory: Literal["always", "never"] = "never") -> dict[str, Any]:
    """Return `model`, `data` and `run` of a trainer that gets its model and rows in memory and writes nothing.

    Args:
        memory: whether the trainer keeps peaks by phase.
    """
    return {
        "model": ModelSettings(name_or_path="unused"),
        "data": DataSettings(train="unused"),
        "run": RunSettings(output="unused", memory=memory, progress=False),
    }
