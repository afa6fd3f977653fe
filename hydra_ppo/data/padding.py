"""Which token may fill up rows for a program that looks for the last token that is no padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra_ppo.data.ends import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPARE = ("pad", "reserved", "unused")
"""Parts of names that makers of vocabularies give to tokens that stand in no text."""

_ODD = "\u2603 \u4e00 \U0001f9ff \U00010348 \x7f"
"""What a tokenizer that has an unknown token calls by it."""


@dataclass(frozen=True)
class Padding:
    """A token that fills up rows and is part of no text.

    Attributes:
        id, text: of the token.
        why: why the tokenizer's own would not do; None where it is that one.
    """

    id: int
    text: str
    why: str | None


def pad_unread(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int]) -> Padding:
    """Let a tokenizer pad with a token that no text ends in or contains; return the token.

    A classifier of transformers reads a row at its last token that is not the padding; versions before 4.50 at the one before
    the first that is. Where padding is also the end of an answer, both read another token than the one that was trained. So
    it is the tokenizer's own pad token where that serves as nothing else, then a token that its maker kept in reserve, then a
    new one.

    Args:
        tokenizer: its pad token is changed, and a token may be added.
        ends: tokens that end answers.
    """
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, *ends} - {None}
    own: int | None = tokenizer.pad_token_id
    if own is None:
        why = "the tokenizer has no pad token"
    elif own in taken:
        why = f"the tokenizer pads with {tokenizer.pad_token}, which also begins or ends texts"
    elif own in _ids(tokenizer, _ODD):
        why = f"the tokenizer pads with {tokenizer.pad_token}, which also stands for unknown text"
    else:
        return Padding(own, str(tokenizer.pad_token), None)
    vocabulary = tokenizer.get_vocab()
    spare = _spare(tokenizer, taken | {own, tokenizer.unk_token_id})
    text = spare or next(name for name in ("<pad>", "<|pad|>", "<|classifier_pad|>") if name not in vocabulary)
    tokenizer.add_special_tokens({"pad_token": text})
    return Padding(tokenizer.pad_token_id, text, why)


def _spare(tokenizer: PreTrainedTokenizerBase, taken: set[int | None]) -> str | None:
    """Return a special token whose name says that no text holds it; None where there is none."""
    template = str(tokenizer.chat_template or "")
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special_ids(tokenizer)) if i not in taken}
    free = [name for name in names.values() if name not in template]
    return next((name for word in _SPARE for name in free if word in name.lower()), None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
