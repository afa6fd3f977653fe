"""The small grammar that the quickstart's product reviews come from: its words, its sentences, and what it can produce."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise, product

# Words that carry sentiment, by the slot of the grammar they fill.
GOOD_WORDS = {
    "good": "great excellent wonderful perfect sturdy reliable beautiful solid superb lovely impressive good",
    "well": "perfectly flawlessly nicely well",
    "happy": "happy pleased delighted thrilled",
    "love": "love like enjoy adore",
    "loves": "loves likes enjoys adores",
    "best": "bargain pleasure joy",
    "verdict": "buy recommend work",
}
BAD_WORDS = {
    "bad": "awful terrible cheap flimsy useless faulty ugly weak horrible poor shoddy bad",
    "badly": "poorly badly terribly",
    "sad": "unhappy annoyed disappointed frustrated",
    "hate": "hate dislike regret",
    "hates": "hates dislikes",
    "worst": "waste mistake nightmare",
    "broke": "broke failed cracked stopped",
    "verdict": "returned refund fails breaks",
}

POLARITY = {word: 1.0 for words in GOOD_WORDS.values() for word in words.split()} | {
    word: -1.0 for words in BAD_WORDS.values() for word in words.split()
}


def _words(text: str) -> list[str]:
    return text.split()


# A context-free grammar without recursion: each symbol's alternatives, one a line, `{symbol}` standing for another.
GRAMMAR: dict[str, list[str]] = {
    **{slot: _words(words) for slot, words in (GOOD_WORDS | BAD_WORDS).items() if slot != "verdict"},
    "product": _words(
        "kettle lamp toaster blender fan heater radio speaker drill vacuum mixer clock camera printer iron grinder juicer "
        "freezer oven scale charger keyboard monitor projector humidifier dryer shaver cooker sander scanner"
    ),
    "aspect": _words("cord switch case finish design manual plug base display timer button packaging handle light"),
    "person": _words("wife husband sister brother mother father son daughter friend neighbor"),
    "when": [
        *("last week", "last month", "last year", "two weeks ago", "a month ago", "in May", "in June"),
        *("on sale", "online", "for the kitchen", "for the office", "as a gift"),
    ],
    "duration": ["two days", "one week", "three weeks", "a month", "six months", "a year"],
    "very": ["really", "very", "so", "simply"],
    "is": ["is", "seems", "feels", "is {very}"],
    "vp_good": ["{is} {good}", "works {well}", "is not {bad}", "never fails", "never breaks", "is a {best}"],
    "vp_bad": ["{is} {bad}", "works {badly}", "is not {good}", "does not work", "{broke} after {duration}", "is a {worst}"],
    "clause_good": ["it {vp_good}", "the {aspect} {vp_good}", "I {love} it", "I am {happy} with it"],
    "clause_bad": ["it {vp_bad}", "the {aspect} {vp_bad}", "I {hate} it", "I am {sad} with it"],
    "open_event": [
        "I bought this {product} {when} and",
        "I ordered this {product} {when} and",
        "I bought this {product} for my {person} and",
        "My {person} gave me this {product} and",
        "We have used this {product} for {duration} and",
    ],
    "open_aspect": [
        "The {aspect} of this {product}",
        "For the price , the {aspect} of this {product}",
        "Out of the box , the {aspect} of this {product}",
    ],
    "event_good": ["{clause_good} ."],
    "event_bad": ["{clause_bad} ."],
    "event_mixed": ["{clause_good} , but {clause_bad} .", "{clause_bad} , but {clause_good} ."],
    "event_plain": ["I use it every day .", "it came with a long manual .", "it sits on my desk ."],
    "aspect_good": ["{vp_good} .", "{vp_good} and {clause_good} ."],
    "aspect_bad": ["{vp_bad} .", "{vp_bad} and {clause_bad} ."],
    "aspect_mixed": ["{vp_good} , but {clause_bad} .", "{vp_bad} , but {clause_good} ."],
    "aspect_plain": ["is blue .", "is gray .", "is the same as in the picture .", "is larger than the old one ."],
    "more_good": [
        "It {vp_good} .",
        "The {aspect} {vp_good} .",
        "I {love} it .",
        "My {person} {loves} it too .",
        "I would buy it again .",
        "I recommend it to everyone .",
        "Overall , I am {happy} .",
    ],
    "more_bad": [
        "It {vp_bad} .",
        "The {aspect} {vp_bad} .",
        "I {hate} it .",
        "My {person} {hates} it too .",
        "I would not buy it again .",
        "I cannot recommend it .",
        "I returned it after {duration} .",
        "I want a refund .",
        "Overall , I am {sad} .",
    ],
    "more_mixed": [
        "The {aspect} {vp_good} , but the {aspect} {vp_bad} .",
        "The {aspect} {vp_bad} , but the {aspect} {vp_good} .",
    ],
    "more_plain": [
        "It came in a plain box .",
        "I use it every day .",
        "It cost forty dollars .",
        "My {person} has the same one .",
        "The color is blue .",
    ],
    "event": ["{event_good}", "{event_bad}", "{event_mixed}", "{event_plain}"],
    "aspect_rest": ["{aspect_good}", "{aspect_bad}", "{aspect_mixed}", "{aspect_plain}"],
    "more": ["{more_good}", "{more_bad}", "{more_mixed}", "{more_plain}"],
    "review": ["{open_event} {event} {more} {more}", "{open_aspect} {aspect_rest} {more} {more}"],
}


def split_words(text: str) -> list[str]:
    """Split a text into words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def join_words(words: Iterable[str]) -> str:
    """Join words and punctuation marks; the inverse of `split_words` on the grammar's texts."""
    return re.sub(r" ([.,!?])", r"\1", " ".join(words))


def expand(symbol: str, rng: random.Random) -> list[str]:
    """Return the words of one text that a symbol can stand for, drawn at random."""
    words = []
    for part in rng.choice(GRAMMAR[symbol]).split():
        words += expand(part[1:-1], rng) if part[0] == "{" else [part]
    return words


def expansions(symbol: str) -> Iterator[str]:
    """Yield every text that a symbol can stand for."""
    for alternative in GRAMMAR[symbol]:
        parts = [list(expansions(part[1:-1])) if part[0] == "{" else [part] for part in alternative.split()]
        yield from (" ".join(choice) for choice in product(*parts))


@cache
def grammar_bigrams() -> frozenset[tuple[str, str]]:
    """Return every pair of neighbouring words that the grammar can produce, from the first and last words of its symbols."""

    @cache
    def edge(part: str, index: int) -> frozenset[str]:
        if part[0] != "{":
            return frozenset([part])
        return frozenset().union(*(edge(alternative.split()[index], index) for alternative in GRAMMAR[part[1:-1]]))

    neighbours = {pair for alternatives in GRAMMAR.values() for text in alternatives for pair in pairwise(text.split())}
    return frozenset(pair for left, right in neighbours for pair in product(edge(left, -1), edge(right, 0)))
