"""How text becomes tokens and back: how prompt and answer join, and what a reward function reads.

A rollout continues the tokens of a prompt. So an answer is encoded together with its prompt and cut where the prompt's
tokens end, and decoded together with them and cut where the prompt's text ends: what SFT trains is what can be sampled, and
what a reward function reads is what the tokens say, for every kind of tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.boundaries import HUMAN
from hydra_ppo.data.ends import Ends, answer_header, find_ends, takes_parts
from hydra_ppo.data.formats import Conversation, Messages, checked_unicode
from hydra_ppo.data.sources import Rejected, one_line
from hydra_ppo.errors import DataError
from hydra_ppo.runtime.time_limit import rendering_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF_A_CHARACTER = "\ufffd"


class Answer(NamedTuple):
    """An answer as it is trained: its text, its tokens, and whether a token of the whole text crossed the boundary."""

    text: str
    ids: tuple[int, ...]
    crossing: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy reads it, perhaps cut to the longest length.

    Attributes:
        text, ids: what is left of it; chat is rendered up to where the answer begins.
        messages: the same as messages, where it came as such.
        whole_text, whole_ids: what answers are joined to: of text all of it, of messages those that are left.
        notes: what was done to it.
        options: what its row hands to the chat template.
    """

    text: str
    ids: tuple[int, ...]
    messages: Messages | None
    whole_text: str
    whole_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Codec:
    """Turns conversations into tokens with one tokenizer, one end of a turn, and one day.

    Args:
        tokenizer: it is not changed.
        settings: lengths, data.end_of_turn, data.chat_template_kwargs.
        now: the time that chat templates see, so that a row says the same on every day of a run.

    Raises:
        ConfigError: where there is no end of an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, now: datetime | None = None) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.ends: Ends = find_ends(tokenizer, end_of_turn=settings.end_of_turn)
        self.now = now or datetime.now()
        self.header = answer_header(tokenizer)
        self._takes_parts = takes_parts(tokenizer)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def prompt(self, conversation: Conversation, place: str = "", options: Mapping[str, Any] | None = None) -> Prompt:
        """Return a prompt's tokens, cut to data.max_prompt_tokens as data.long_prompts says.

        Of messages, whole turns go from the front, the system message stays; then the beginning of the last message. Of text
        of HH's kind whole turns go, of other text the first tokens. No character is cut in two.

        Args:
            place: where it stands, for errors.
            options: what its row hands to the chat template, such as tools, over data.chat_template_kwargs.

        Raises:
            Rejected: where the prompt has no tokens, is too long, or the template refuses it.
            DataError: for messages where the tokenizer has no chat template.
        """
        options = options or {}
        found = replace(self._prompt(conversation, place, options), options=options)
        if options and isinstance(conversation, str):
            note = f"{' and '.join(options)} of a prompt that is text, which no chat template writes, are not used"
            found = replace(found, notes=(*found.notes, note))
        return found

    def _prompt(self, conversation: Conversation, place: str, options: Mapping[str, Any]) -> Prompt:
        text, ids = self._encoded(conversation, options, place)
        if not set(ids) - {self.tokenizer.bos_token_id}:
            raise Rejected("prompt has no tokens")
        messages = None if isinstance(conversation, str) else conversation
        limit, policy = self.settings.max_prompt_tokens, self.settings.long_prompts
        if len(ids) <= limit:
            return Prompt(text, tuple(ids), messages, text, tuple(ids))
        if policy != "truncate":
            raise Rejected(
                f"prompt is over data.max_prompt_tokens={limit} (data.long_prompts={policy})", malformed=policy == "error"
            )
        note = f"prompt cut to data.max_prompt_tokens={limit}"
        if messages is not None:
            text, ids, messages = self._shortened(messages, limit, options)
            return Prompt(text, tuple(ids), messages, text, tuple(ids), (note,))
        cut_text, cut_ids = self._cut_text(text, ids, limit)
        return Prompt(cut_text, tuple(cut_ids), None, text, tuple(ids), (note,))

    def _encoded(self, conversation: Conversation, options: Mapping[str, Any], place: str = "") -> tuple[str, list[int]]:
        if isinstance(conversation, str):
            return conversation, self._ids("prompt", conversation, special=True)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{place} holds chat messages, but the tokenizer has no chat template; "
                "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text."
            )
        text = self.render(conversation, add_generation_prompt=True, options=options)
        return text, self._ids("prompt", text, special=False)

    def _shortened(self, messages: Messages, limit: int, options: Mapping[str, Any]) -> tuple[str, list[int], Messages]:
        """Drop turns from the front until the rest fits, then the beginning of the last message."""
        first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
        system, turns = messages[:first], messages[first:]
        while True:
            text, ids = self._encoded([*system, *turns], options)
            if len(ids) <= limit:
                return text, ids, [*system, *turns]
            later = next((i for i in range(1, len(turns)) if turns[i]["role"] == "user"), None)
            if later is None:
                break
            turns = turns[later:]
        *before, last = turns or [{"role": "system", "content": ""}]  # a system message alone is not cut
        words = self._ids("prompt", last["content"], special=False)
        dropped = len(ids) - limit
        while dropped < len(words):
            content = self._said(words[dropped:])
            if not content.startswith(HALF_A_CHARACTER) and content.strip():
                cut = [*system, *before, {**last, "content": content}]
                text, ids = self._encoded(cut, options)
                if len(ids) <= limit:
                    return text, ids, cut
            dropped += 1
        raise Rejected(
            f"prompt is over data.max_prompt_tokens={limit} without a word of its last message: the system message and the "
            "template alone take that much"
        )

    def _cut_text(self, text: str, ids: list[int], limit: int) -> tuple[str, list[int]]:
        """Drop whole turns of HH text where there are several, else the first tokens; a begin token stays."""
        at = text.find(HUMAN, 1)
        while at > 0:
            rest = self._ids("prompt", text[at:], special=True)
            if len(rest) <= limit:
                return text[at:], rest
            at = text.find(HUMAN, at + 1)
        start = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] and limit > 1 else []
        for length in range(limit - len(start), 0, -1):
            kept = ids[len(ids) - length :]
            found = self._said(kept)
            if not found.startswith(HALF_A_CHARACTER):
                return found, start + kept
        raise Rejected("prompt has no tokens")

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(self, name: str, prompt: Prompt, answer: Conversation) -> Answer:
        """Return an answer's tokens after its prompt, up to the end of the turn and with it; not cut to a length.

        Raises:
            Rejected: where it has no tokens, or the template does not render it as a continuation of its prompt.
        """
        if isinstance(answer, str):
            text = answer
            bare = text.rstrip()
            if any(bare.endswith(end) for end in self._end_texts()):  # a newline after an end is never sampled
                text = bare
        else:
            text = self._written(name, prompt, answer)
        ids, crossing = self._continuation(name, prompt, text, special=isinstance(answer, str))
        if self.ends.turn in ids:
            ids = ids[: ids.index(self.ends.turn)]
        while ids and ids[-1] in (self.ends.turn, self.tokenizer.eos_token_id):
            ids.pop()
        if not ids:
            raise Rejected(f"{name} has no tokens")
        return Answer(text, (*ids, self.ends.turn), crossing)

    def _written(self, name: str, prompt: Prompt, answer: Messages) -> str:
        """Return what the chat template adds to a prompt for its answer."""
        messages = prompt.messages or []
        whole = self.render([*messages, *answer], add_generation_prompt=False, options=prompt.options)
        if whole.startswith(prompt.whole_text):
            return whole[len(prompt.whole_text) :]
        # Mistral's write the system message into the last message, and nowhere once that is an answer; the turns alone do.
        turns = [message for message in messages if message["role"] != "system"]
        if 0 < len(turns) < len(messages):
            before = self.render(turns, add_generation_prompt=True, options=prompt.options)
            whole = self.render([*turns, *answer], add_generation_prompt=False, options=prompt.options)
            if whole.startswith(before):
                return whole[len(before) :]
        raise Rejected(f"the chat template does not render {name} as a continuation of its prompt")

    def _end_texts(self) -> list[str]:
        ends = (self.ends.text, self.tokenizer.eos_token)
        return [end for end in ends if end]

    def _continuation(self, name: str, prompt: Prompt, text: str, special: bool) -> tuple[list[int], bool]:
        """Return the tokens of `text` that follow the prompt's, and whether the whole text would cut them otherwise."""
        start = list(prompt.whole_ids)
        whole = self._ids(name, prompt.whole_text + text, special)
        if whole[: len(start)] == start:
            return whole[len(start) :], False
        # A merge crosses the boundary. A rollout goes on from the prompt's tokens, so these are followed by others that say
        # the same; which, is found by encoding the text alone, or after a word that nothing merges with.
        wanted = self._said(whole)
        tries = [self._ids(name, text, special=False)]
        for anchor in ("\n", "a\n", self.tokenizer.bos_token or "\n"):
            before = self._ids(name, anchor, special=False)
            joint = self._ids(name, anchor + text, special=False)
            if joint[: len(before)] == before:
                tries.append(joint[len(before) :])
        return next((ids for ids in tries if self._said([*start, *ids]) == wanted), tries[0]), True

    def _said(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # -- both --------------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, *, add_generation_prompt: bool, options: Mapping[str, Any] | None = None) -> str:
        """Return messages as the chat template writes them; `options` of a row win over data.chat_template_kwargs.

        Raises:
            Rejected: with the template's reason.
        """
        from hydra_ppo.compat import template_clock  # torch, which reading settings and rows does without

        handed: dict[str, Any] = {**self.settings.chat_template_kwargs, **(options or {})}
        handed |= {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if self._takes_parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        with rendering_limit():
            try:
                with template_clock(self.now):
                    text = self.tokenizer.apply_chat_template(messages, **handed)
            except Exception as error:  # a template is a program of its own and may raise anything
                raise Rejected(f"the chat template refuses the messages ({one_line(error)})") from error
        return cast(str, text)  # its type says what there can be with tokenize=True, too

    def _ids(self, name: str, text: str, special: bool) -> list[int]:
        """Encode a text; one begin token whatever the text brings, and no end token that the tokenizer adds."""
        checked_unicode(name, text)
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        while special and ids and ids[-1] == eos:
            ids.pop()
        return ids


def answer_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    show_special: bool = False,
    ends: Sequence[int] = (),
) -> list[str]:
    """Return what sampled responses say after their prompts.

    Args:
        prompts, responses: token ids, row by row.
        show_special: keep special tokens inside a response; its end is left out anyway.
        ends: tokens that end a response.
    """
    options: Mapping[str, Any] = {"skip_special_tokens": not show_special, "clean_up_tokenization_spaces": False}
    bodies = [list(row[:-1]) if show_special and row and row[-1] in ends else list(row) for row in responses]
    before = tokenizer.batch_decode([list(prompt) for prompt in prompts], **options)
    whole = tokenizer.batch_decode([[*prompt, *body] for prompt, body in zip(prompts, bodies, strict=True)], **options)
    texts = []
    for start, text, body in zip(before, whole, bodies, strict=True):
        # A prompt that was cut inside a character has no text of its own to cut away.
        texts.append(text[len(start) :] if text.startswith(start) else str(tokenizer.decode(body, **options)))
    return texts


class StopStrings:
    """Says which responses hold one of some strings; the strings are looked for in the text of the last tokens.

    Args:
        tokenizer: turns tokens into text.
        strings: none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token is at least a byte of text, but for those that say nothing.
        self.tokens = max(len(string.encode()) for string in strings) + 8
        # SentencePiece drops the space that a text begins with; behind a letter it stays.
        self.before = list(tokenizer("a", add_special_tokens=False).input_ids[-1:])

    def __call__(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each response whether it holds a string that ends it."""
        tails = [[*self.before, *response[-self.tokens :]] for response in responses]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        (start,) = self.tokenizer.batch_decode([self.before], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(string in text[len(start) :] for string in self.strings) for text in texts]


def unknown_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Return the ids below `rows` that stand for no token, as in a vocabulary padded to a round size; none of an empty one."""
    known = set(tokenizer.get_vocab().values())
    return sorted(set(range(rows)) - known) if known else []
