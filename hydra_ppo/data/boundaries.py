"""Where the prompt ends in two texts that share it, and where the last turn of a longer text begins.

Two answers may begin with the same words, so the prompt is not all that two texts share: it ends where the turn begins that
they answer in. Templates write such a beginning in four ways, a tag (`<|im_start|>assistant`), a bracket (`[/INST]`), a heading
(`### Response:`) or a label (`Assistant:`); which words a template puts into it matters little, how it is written a lot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""What begins a turn in text of HH's kind."""

_SPEAKERS = "assistant|model|chatbot|bot|gpt|ai"
_ANSWERS = f"{_SPEAKERS}|response|answer|output|completion|reply|summary"
_ASKERS = "user|human|prompter|instruction|question|input|query"
_TAG = r"<[^\s<>]{1,40}>"
_AFTER_NAME = r"(?:<[|\uff5c][^\s<>]{0,20}(?:end|mid|sep)[^\s<>]{0,20}[|\uff5c]>)?:?"  # <|end_header_id|>
_NAMED_TAG = rf"(?:{_TAG} ?(?:%s)(?=[\r\n<:])|<[|\uff5c]?(?:%s)(?:_\w{{1,20}})?[|\uff5c]?>){_AFTER_NAME}"
_LINE = r"(?:^|(?<=[\n>\]]))[ \t]*"
_WORDS = r"(?:[A-Z0-9][\w']{0,30} ){0,3}"  # "GPT4 Correct Assistant:"; words of a sentence are not capitals


class _Style(NamedTuple):
    """How a family of templates begins the turn of whoever answers, and of whoever asks."""

    answer: re.Pattern[str]
    question: re.Pattern[str]


_TAGS = _Style(
    re.compile(_NAMED_TAG % (_SPEAKERS, _SPEAKERS), re.IGNORECASE), re.compile(_NAMED_TAG % (_ASKERS, _ASKERS), re.IGNORECASE)
)
_BRACKETS = _Style(
    re.compile(rf"\[/INST\]|\[(?:{_ANSWERS})\]", re.IGNORECASE), re.compile(rf"\[INST\]|\[(?:{_ASKERS})\]", re.IGNORECASE)
)
_HEADINGS = _Style(
    *(
        re.compile(rf"^#{{1,6}} ?(?:\w{{1,30}} )?(?:{names})\b[^\n:]{{0,20}}(?::|(?=\n))", re.IGNORECASE | re.MULTILINE)
        for names in (_ANSWERS, _ASKERS)
    )
)
_LABELS = re.compile(
    rf"{_LINE}{_WORDS}(?:{'|'.join(name.title() for name in _ANSWERS.split('|'))}|GPT|AI|ASSISTANT|TL;DR|A)[:\uff1a](?=\s|\Z)"
    r"|(?<=[\s>])(?:ASSISTANT|MODEL|CHATBOT|BOT|GPT|AI):(?=\s|\Z)"
)
_STYLES = (_TAGS, _BRACKETS, _HEADINGS)

_ANY_NAME = (
    re.compile(r"<[|\uff5c][^\s<>]{1,40}[|\uff5c]>(?:[\w -]{1,30}(?=[\r\n]|<[|\uff5c]))?" + _AFTER_NAME),
    re.compile(r"^#{2,6} [^\n:]{1,40}:", re.MULTILINE),
    re.compile(_LINE + r"[^\Wa-z\d_]\w{0,30}(?: [^\Wa-z\d_]\w{0,30}){0,2}[:\uff1a](?=\s|\Z)"),
)
"""The same for names that nobody listed: taken where there are two of a kind, one for the question and one for the answer."""


class Boundary(NamedTuple):
    """Where a prompt ends, and in words how that was found."""

    end: int
    note: str


def find_boundary(shared: str, header: str = "") -> Boundary:
    """Find where the prompt ends in what two texts share.

    Args:
        shared: the beginning that both texts have, up to the first character that differs.
        header: what the tokenizer's own chat template writes between a question and its answer.

    Returns:
        The end of the last turn's beginning. Where no turn begins: the end of the last line, or of the last word.
    """
    if header.strip() and (at := shared.rfind(header)) > 0:
        return Boundary(at + len(header), "the prompt ends where the chat template begins an answer")
    if HUMAN in shared and (at := shared.rfind(ASSISTANT)) >= 0:
        return _at(shared, at, at + len(ASSISTANT))
    for pattern in (*(style.answer for style in _STYLES), _LABELS):
        # A text that begins with the answer's turn has no prompt before it.
        found = [match for match in pattern.finditer(shared) if shared[: match.start()].strip()]
        if found:
            return _at(shared, found[-1].start(), _past_newlines(shared, found[-1].end()))
    for pattern in _ANY_NAME:
        turns = list(pattern.finditer(shared))
        if len(turns) > 1:
            return Boundary(_past_newlines(shared, turns[-1].end()), "the prompt ends at the last turn that both texts begin")
    line = shared.rfind("\n") + 1
    if shared[:line].strip():
        return Boundary(line, "no turn begins in what chosen and rejected share; the prompt ends at its last whole line")
    word = next((i for i in range(len(shared), 0, -1) if shared[i - 1].isspace()), 0)
    # Tokenizers count a space to the word after it.
    word -= word > 0 and shared[word - 1] == " "
    return Boundary(word, "no turn begins in what chosen and rejected share; the prompt ends at its last whole word")


def last_turns(prompt: str, answers: Sequence[str], header: str = "") -> list[int]:
    """Return for each answer where its last turn begins: 0 where it is one turn, as the prompt's template writes turns.

    Text of HH's kind may hold turns on one side alone. Of other templates both answers have to: one that runs on into turns
    of its own making is a bad answer, not a longer conversation.
    """
    starts = [_last_hh_turn(answer) for answer in answers]
    if any(starts):
        return starts
    if header.strip() and prompt.endswith(header):
        starts = [answer.rfind(header) + len(header) if header in answer else 0 for answer in answers]
        return starts if all(starts) else [0] * len(answers)
    for style in _STYLES:
        turns = list(style.answer.finditer(prompt))
        if turns and not prompt[turns[-1].end() :].strip():
            starts = [_last_turn(answer, style) for answer in answers]
            return starts if all(starts) else [0] * len(answers)
    return [0] * len(answers)


def _at(shared: str, start: int, end: int) -> Boundary:
    return Boundary(end, f"the prompt ends at the last {shared[start:end].strip()!r} of what chosen and rejected share")


def _past_newlines(text: str, end: int) -> int:
    return end + len(text[end:]) - len(text[end:].lstrip("\r\n"))


def _last_hh_turn(answer: str) -> int:
    turn = answer.rfind(ASSISTANT)
    return turn + len(ASSISTANT) if turn >= 0 and HUMAN in answer[:turn] else 0


def _last_turn(answer: str, style: _Style) -> int:
    asked = style.question.search(answer)
    turns = [] if asked is None else [match for match in style.answer.finditer(answer) if match.start() >= asked.end()]
    return _past_newlines(answer, turns[-1].end()) if turns else 0
