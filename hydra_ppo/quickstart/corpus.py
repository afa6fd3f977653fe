"""Product reviews in pairs, and a gold scorer that judges them: the data of the quickstart, without a download.

A prompt is the opening of a review ("I bought this kettle last week and"), a response its continuation, to be
joined by a space. The gold scorer judges sentiment and fluency; it labels the preference pairs and evaluates,
and training never sees it.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_ppo.errors import ConfigError
from hydra_ppo.quickstart.grammar import GRAMMAR, POLARITY, expand, expansions, grammar_bigrams, join_words, split_words

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNK)  # in this order, so their ids are 0, 1 and 2

NEGATORS = {"not", "never", "cannot", "no"}
CLAUSE_ENDS = {".", ",", "but", "and"}

# What the sentences of a review are about, by its mood.
PLANS = {
    "positive": [["good", "good"], ["good", "plain", "good"], ["good", "plain"], ["plain", "good"], ["good", "good", "good"]],
    "mixed": [["mixed"], ["mixed", "plain"], ["good", "bad"], ["bad", "good"], ["plain", "mixed"], ["plain", "plain"]],
    "negative": [["bad", "bad"], ["bad", "plain", "bad"], ["bad", "plain"], ["plain", "bad"], ["bad", "bad", "bad"]],
}
# Few are positive, so that the policy after SFT on the better of two leaves room for PPO.
MOODS, MOOD_WEIGHTS = ("positive", "mixed", "negative"), (0.22, 0.4, 0.38)

# Of the pairs, one of whose continuations is damaged; in half of them the other is the same text undamaged. With few of
# them the reward model learns sentiment alone, and PPO finds out: it says its best sentence twice.
DAMAGED_SHARE = 0.4
SMALLEST_GAP = 0.25  # of the gold scores within a pair
HELD_OUT_EVERY = 8  # one opening in this many is kept for evaluation
WORDS = (6, 26)  # shortest and longest response without a penalty, in words


@dataclass(frozen=True)
class Corpus:
    """Preference pairs and prompts; the openings of the two `eval` parts never occur in the others."""

    preferences: list[dict[str, str]]  # {"prompt", "chosen", "rejected"}
    eval_preferences: list[dict[str, str]]
    prompts: list[dict[str, str]]  # {"prompt"}
    eval_prompts: list[dict[str, str]]


# ---------------------------------------------------------------- reviews


@cache
def openings() -> tuple[list[str], list[str]]:
    """Return all openings of the grammar: those for training and those held out, by a hash of their text."""
    parts: tuple[list[str], list[str]] = ([], [])
    for symbol in ("open_event", "open_aspect"):
        for text in expansions(symbol):
            opening = join_words(text.split())
            parts[zlib.crc32(opening.encode()) % HELD_OUT_EVERY == 0].append(opening)
    return parts


def _continuation(opening: str, mood: str, rng: random.Random) -> list[str]:
    """Continue an opening in a mood; a word of sentiment, an aspect or a whole sentence is not used twice."""
    first = "event" if opening.endswith(" and") else "aspect"
    kinds = rng.choice(PLANS[mood])
    once = POLARITY.keys() | set(GRAMMAR["aspect"])
    while True:
        sentences = [expand(f"{first if i == 0 else 'more'}_{kind}", rng) for i, kind in enumerate(kinds)]
        words = [word for sentence in sentences for word in sentence]
        weighty = [word for word in split_words(opening) + words if word in once]
        if len(set(weighty)) == len(weighty) and len({tuple(s[1:]) for s in sentences}) == len(sentences):
            if WORDS[0] <= len(words) <= WORDS[1]:
                return words
            kinds = rng.choice(PLANS[mood])


def _damage(words: list[str], rng: random.Random) -> list[str]:
    """Break a continuation: stutter, shuffle, cut it off, say it twice or say one of its sentences again."""
    kind = rng.choice(("stutter", "shuffle", "cut", "twice", "echo", "echo", "echo"))
    if kind == "shuffle":
        return rng.sample(words, len(words))
    if kind == "cut":
        return words[: rng.randint(2, len(words) - 2)]
    if kind == "twice":
        return words + words
    if kind == "echo":
        ends = [i + 1 for i, word in enumerate(words) if word == "."]
        sentences = [words[start:end] for start, end in pairwise([0, *ends])]
        again = rng.choice(sentences)
        return words + again * rng.choice((1, 1, 2))
    weighty = [i for i, word in enumerate(words) if word in POLARITY] or [len(words) // 2]
    i = rng.choice(weighty)
    return words[:i] + [words[i]] * rng.randint(2, 5) + words[i + 1 :]


def _pair(opening: str, rng: random.Random) -> dict[str, str]:
    """Write two continuations whose gold scores differ; the better one is chosen."""
    while True:
        moods = rng.choices(MOODS, MOOD_WEIGHTS, k=2)
        texts = [_continuation(opening, mood, rng) for mood in moods]
        if rng.random() < DAMAGED_SHARE:
            texts[0] = _damage(rng.choice(texts), rng)
        better, worse = [join_words(words) for words in texts]
        gap = gold_score(opening, better) - gold_score(opening, worse)
        if gap < 0:
            better, worse = worse, better
        if abs(gap) >= SMALLEST_GAP:
            return {"prompt": opening, "chosen": better, "rejected": worse}


def make_corpus(
    seed: int, pairs: int = 13000, eval_pairs: int = 300, prompts: int = 2000, eval_prompts: int = 200, label_noise: float = 0.1
) -> Corpus:
    """Write the corpus; the same arguments give the same corpus.

    `label_noise` is the share of the training pairs whose label is flipped, to the nearest pair; held-out
    pairs carry the gold label. Prompts are distinct; pairs share openings.

    Raises ConfigError where more prompts are asked for than the grammar has, or `label_noise` is no share.
    """
    if not 0 <= label_noise <= 1:
        raise ConfigError(f"label_noise={label_noise} must lie in [0, 1]; choose for example 0.1.")
    known, held_out = openings()
    for name, count, pool in (("prompts", prompts, known), ("eval_prompts", eval_prompts, held_out)):
        if count > len(pool):
            raise ConfigError(f"{name}={count} is more than the grammar has; choose at most {len(pool)}.")
    rng = random.Random(seed)
    preferences = [_pair(rng.choice(known), rng) for _ in range(pairs)]
    for i in rng.sample(range(pairs), round(label_noise * pairs)):
        pair = preferences[i]
        preferences[i] = {"prompt": pair["prompt"], "chosen": pair["rejected"], "rejected": pair["chosen"]}
    return Corpus(
        preferences=preferences,
        eval_preferences=[_pair(rng.choice(held_out), rng) for _ in range(eval_pairs)],
        prompts=[{"prompt": opening} for opening in rng.sample(known, prompts)],
        eval_prompts=[{"prompt": opening} for opening in rng.sample(held_out, eval_prompts)],
    )


# ---------------------------------------------------------------- gold scorer


def sentiment(prompt: str, response: str) -> float:
    """Add up the words of sentiment, each once, and squash the sum into (-2, 2).

    A negator flips the next such word of its clause. What counts as good must stand where the grammar could
    have put it, so that a list of fine words gains nothing; what counts as bad always counts.
    """
    words = split_words(response)
    legal = grammar_bigrams()
    counted = {}
    negated = False
    previous = (split_words(prompt) or ["."])[-1]
    for word in words:
        if word in CLAUSE_ENDS:
            negated = False
        elif word in NEGATORS:
            negated = True
        elif word in POLARITY:
            value = -POLARITY[word] if negated else POLARITY[word]
            if value < 0 or (previous, word) in legal:
                counted[word] = value
            negated = False
        previous = word
    return 2 * math.tanh(sum(counted.values()) / 2.5)


def fluency(prompt: str, response: str) -> float:
    """Return 1 for a text of the grammar, and less, down to -3, for one that is broken.

    Penalties: neighbouring words that the grammar cannot produce, trigrams and words of sentiment said again,
    no full stop at the end, fewer or more words than WORDS.
    """
    words = split_words(response)
    if not words:
        return -3.0
    context = split_words(prompt)[-1:] + words
    bigrams = list(pairwise(context)) or [("", context[0])]
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    weighty = [word for word in words if word in POLARITY]
    unseen = sum(pair not in grammar_bigrams() for pair in bigrams)
    repeats = len(trigrams) - len(set(trigrams)) + len(weighty) - len(set(weighty))
    penalty = (
        0.25 * min(2, unseen)  # one break of the grammar is felt, also in a long text
        + 3 * unseen / len(bigrams)
        + min(2.5, 0.5 * repeats)
        + (words[-1] != ".")
        + 1.5 * max(0, WORDS[0] - len(words)) / WORDS[0]
        + min(2.0, max(0, len(words) - WORDS[1]) / 8)
    )
    return max(-3.0, 1 - penalty)


def gold_score(prompt: str, response: str) -> float:
    """Score a response to a prompt: sentiment plus fluency, in [-3, 3]."""
    return max(-3.0, sentiment(prompt, response) + fluency(prompt, response))


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(texts: Iterable[str], folder: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer over the words of the texts, and save it where a folder is given.

    The special tokens are `<pad>`, `<eos>` and `<unk>`, with ids 0, 1 and 2; nothing is added to a text
    that is encoded. Decoding puts the spaces back.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in split_words(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    # The cleanup of this decoder takes out the space before a punctuation mark; its prefix never occurs here.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def build_llama_config(vocab_size: int) -> LlamaConfig:
    """Shape a Llama of about 0.6 million parameters; every linear layer's inputs are a multiple of nf4's block of 64."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        bos_token_id=SPECIAL_TOKENS.index(EOS),
    )
