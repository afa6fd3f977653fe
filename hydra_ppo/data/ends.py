"""Where an answer ends: found by rendering a turn with the chat template, not by a list of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime.time_limit import rendering_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = "Paris is lovely"
"""An answer that no template has in it, and none has a reason to change."""


@dataclass(frozen=True)
class Ends:
    """The tokens at which an answer ends.

    Attributes:
        turn: the one that training answers end in, and that scores are read at.
        ids: all that end a sampled response; `turn` first.
        text: of `turn`.
        notes: what a user should know, a line each.
    """

    turn: int
    ids: tuple[int, ...]
    text: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line: `answers end at <end_of_turn> (106); also at <eos> (1)`."""
        return f"answers end at {self.text} ({self.turn})"


def find_ends(
    tokenizer: PreTrainedTokenizerBase, *, generation_ids: Iterable[int | None] = (), end_of_turn: str | None = None
) -> Ends:
    """Find the tokens at which answers end.

    Training answers end in one token: the setting's, else what the chat template puts after an answer, else the tokenizer's
    eos. A sampled response ends there too, at the tokenizer's eos, and at the generation config's ids as far as they are
    special tokens: an ordinary word in that list is the default of another model's config, and is left out with a note.

    Args:
        tokenizer: with its chat template; it is not changed.
        generation_ids: end ids of the model's generation config.
        end_of_turn: the setting data.end_of_turn.

    Raises:
        ConfigError: where there is no end at all, or the setting is not one token.
    """
    special = special_ids(tokenizer)
    in_template = template_end(tokenizer, special)
    if end_of_turn is not None:
        turn = _named(tokenizer, end_of_turn)
    else:
        turn = tokenizer.eos_token_id if in_template is None else in_template
    notes = []
    others = [] if in_template is None else [in_template]
    for i in sorted({i for i in generation_ids if i is not None}):
        if i in special or i == tokenizer.eos_token_id:
            others.append(i)
        elif i != turn:
            word = tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None
            what = "no token" if word is None else f"the ordinary token {word!r}"
            notes.append(f"generation_config.eos_token_id={i} is {what} of this tokenizer; it does not end a response")
    if turn is None:
        turn = others[0] if others else None
    if turn is None:
        raise ConfigError(
            "tokenizer.eos_token=None leaves responses without an end; set eos_token in tokenizer_config.json, or "
            "data.end_of_turn."
        )
    if tokenizer.eos_token_id is not None:
        others.append(tokenizer.eos_token_id)
    ids = (turn, *sorted(set(others) - {turn}))
    return Ends(turn, ids, str(tokenizer.convert_ids_to_tokens(turn)), tuple(notes))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that are no part of ordinary text: special tokens, and tokens that were added to the vocabulary."""
    return set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))


def template_end(tokenizer: PreTrainedTokenizerBase, special: set[int] | None = None) -> int | None:
    """Return the first special token that the chat template puts after an answer; None where it puts none, or is none."""
    if not tokenizer.chat_template:
        return None
    special = special_ids(tokenizer) if special is None else special
    for messages in _conversations():
        _, found, rest = _rendered(tokenizer, messages).rpartition(_CONTENT)
        if found:
            ids: Sequence[int] = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]
            return next((i for i in ids if i in special), None)
    return None


def answer_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template writes between a question and its answer; empty where it writes nothing, or is none."""
    for messages in _conversations() if tokenizer.chat_template else []:
        question = [{**messages[-1], "role": "user"}]
        text = _rendered(tokenizer, question, add_generation_prompt=True)
        if _CONTENT in text:
            return text.rpartition(_CONTENT)[2]
    return ""


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the chat template shows content only where it comes as a list of parts."""
    if not tokenizer.chat_template:
        return False
    plain, parts = (_CONTENT in _rendered(tokenizer, messages) for messages in _conversations())
    return parts and not plain


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    with rendering_limit():
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
        except Exception:  # a template is a program of its own and may refuse anything; the next conversation may do
            return ""


def _conversations() -> list[list[dict[str, Any]]]:
    """Return conversations that end in an answer: as most templates take them, then with content as a list of parts."""
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTENT}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    return [plain, parts]


def _named(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    found: int | None = tokenizer.get_vocab().get(text)
    if found is None:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(f"data.end_of_turn={text!r} is {len(ids)} tokens of this tokenizer; name one token.")
        found = ids[0]
    return found
