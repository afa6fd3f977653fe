"""What a classifier reads of a prompt and its answer: its own template, one begin token, its own end, never the policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.ends import find_ends
from hydra_ppo.data.formats import Messages, template_options
from hydra_ppo.data.sources import Rejected
from hydra_ppo.data.text import Codec
from hydra_ppo.errors import ConfigError, RewardError
from hydra_ppo.rewards.responses import Responses

UNBOUNDED = 10**9
"""Tokenizers that know no longest length say one above this."""


class Encoded(NamedTuple):
    """Token ids of each text, and how many texts were cut to the longest length."""

    ids: list[list[int]]
    cut: int


class ClassifierText:
    """Turns responses into the tokens of one classifier.

    Messages go through the classifier's chat template, which ends a turn as its maker wanted. Text is the prompt and the
    answer, one after the other, and the classifier's end of an answer where the answer ended; an answer that was cut has
    none. A begin token is there once, where the classifier's tokenizer puts one. What is too long loses tokens on the left,
    after the begin token, so that the answer is always read.

    Args:
        tokenizer, model: of the classifier; they are not changed.
        longest: tokens of the longest text; None is what tokenizer and model say.

    Attributes:
        marks_both_ends: whether texts stand between two tokens whatever they say, as in BERT's family, T5 and BART.
        longest: None where nothing sets a limit.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, longest: int | None = None) -> None:
        self.tokenizer = tokenizer
        alone, marked = self._ids("a"), self._ids("a", special=True)
        at = next((i for i in range(len(marked)) if marked[i : i + len(alone)] == alone), 0)
        self._before, self._after = marked[:at], marked[at + len(alone) :]
        config: Any = model.config
        classed = tokenizer.cls_token_id is not None and self._before[:1] == [tokenizer.cls_token_id]
        self.marks_both_ends = bool(self._after) and (classed or bool(getattr(config, "is_encoder_decoder", False)))
        if not self.marks_both_ends:
            self._after = []
        self._end = self._end_of_answer()
        self._codec = Codec(tokenizer, DataSettings(train="unused")) if tokenizer.chat_template else None
        found = _longest(tokenizer, model)
        if longest is not None and found is not None and longest > found:
            raise ConfigError(
                f"max_tokens={longest} of a reward source is over the {found} tokens that its classifier takes; lower it."
            )
        self.longest = longest or found

    def _end_of_answer(self) -> int | None:
        if self.marks_both_ends:
            return None
        try:
            return find_ends(self.tokenizer).turn
        except ConfigError:  # it has none, and was trained without
            return None

    def encode(self, responses: Responses) -> Encoded:
        """Return the tokens that the classifier reads.

        Raises:
            RewardError: where its chat template refuses a conversation.
        """
        rows = []
        cut = 0
        texts = zip(responses.prompts, responses.texts, responses.ended, strict=True)
        chats = zip(responses.messages(), responses.columns, strict=True)
        for (prompt, text, ended), (messages, row) in zip(texts, chats, strict=True):
            if messages is not None and self._codec is not None:
                ids = self._marked(self._ids(self._render(self._codec, messages, row)))
            else:
                if responses.begin and prompt.startswith(responses.begin):
                    prompt = prompt[len(responses.begin) :]
                ids = self._marked(self._ids(prompt + text))
                if ended and self._end is not None and ids[-1:] != [self._end]:
                    ids.append(self._end)
            short = self._cut(ids)
            cut += len(short) < len(ids)
            rows.append(short)
        return Encoded(rows, cut)

    def _render(self, codec: Codec, messages: Messages, row: Mapping[str, Any]) -> str:
        tools = template_options(row).get("tools")  # what else a row hands to a template is meant for the policy's
        try:
            return codec.render(messages, add_generation_prompt=False, options={"tools": tools} if tools else None)
        except Rejected as rejected:
            raise RewardError(
                f"classifier {self.tokenizer.name_or_path}: {rejected}; give prompts that it takes, or use another classifier."
            ) from rejected

    def _marked(self, ids: list[int]) -> list[int]:
        """Put the marks around a text that its tokenizer puts, each once whatever the text brings."""
        bos = self.tokenizer.bos_token_id
        brought = bos is not None and ids[:1] == [bos]
        while brought and ids[:1] == [bos]:
            ids = ids[1:]
        before = self._before or ([bos] if brought else [])
        if self._after and ids[-len(self._after) :] == self._after:
            ids = ids[: -len(self._after)]
        return [*before, *ids, *self._after] or [self._end or 0]

    def _cut(self, ids: list[int]) -> list[int]:
        if self.longest is None or len(ids) <= self.longest:
            return ids
        bos = self.tokenizer.bos_token_id
        start = self._before or ([bos] if ids[:1] == [bos] else [])
        start = start[: max(self.longest - 1 - len(self._after), 0)]
        return [*start, *ids[len(ids) - (self.longest - len(start)) :]]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        found: Sequence[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return list(found)


def _longest(tokenizer: Any, model: nn.Module) -> int | None:
    """Return the most tokens that a classifier takes; None where neither says."""
    config: Any = model.config
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa's kind counts places from after the padding's.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [limit for limit in limits if limit is not None and 0 < limit < UNBOUNDED]
    return int(min(known)) if known else None
