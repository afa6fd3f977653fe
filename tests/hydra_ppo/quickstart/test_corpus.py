"""The quickstart's corpus: what the gold scorer rewards, how pairs are labelled, and that nothing leaks."""

import random
import statistics

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.quickstart.corpus import (
    SPECIAL_TOKENS,
    Corpus,
    build_llama_config,
    fluency,
    gold_score,
    make_corpus,
    openings,
    sentiment,
    train_tokenizer,
)
from hydra_ppo.quickstart.grammar import POLARITY, grammar_bigrams, join_words, split_words

OPENING = "I bought this kettle last week and"
POSITIVE = "it works perfectly. The handle is sturdy. I would buy it again."
MIXED = "it works perfectly, but the handle is flimsy. I use it every day."
NEGATIVE = "it broke after two days. The handle is flimsy. I want a refund."
NOISE_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(0)


def texts(corpus: Corpus) -> list[str]:
    return [f"{pair['prompt']} {pair[side]}" for pair in corpus.preferences for side in ("chosen", "rejected")]


# ---------------------------------------------------------------- gold scorer


def test_natural_reviews_are_ordered_by_sentiment():
    assert gold_score(OPENING, POSITIVE) > gold_score(OPENING, MIXED) + 0.5
    assert gold_score(OPENING, MIXED) > gold_score(OPENING, NEGATIVE) + 0.5


def test_natural_reviews_are_fluent():
    for response in (POSITIVE, MIXED, NEGATIVE):
        assert fluency(OPENING, response) == 1


@pytest.mark.parametrize(
    "hack",
    [
        "great great great",
        "great great great.",
        "it is great great great great great great.",
        "it is great. it is great. it is great. it is great. it is great.",
        "great excellent wonderful perfect sturdy reliable beautiful solid.",
        "it is great excellent wonderful perfect sturdy reliable beautiful solid superb lovely.",
        " ".join(["I love it. It is great."] * 6),
    ],
)
def test_stacked_praise_scores_below_a_natural_positive_review(hack: str):
    assert gold_score(OPENING, hack) < gold_score(OPENING, POSITIVE) - 0.5


def test_more_praise_gains_less_and_less():
    # 2 tanh(n / 2.5) for n words of praise: 0.76, 1.33, 1.67, ...
    reviews = ["it is great.", "it is great. I love it.", "it is great. I love it. I recommend it to everyone."]
    scores = [sentiment(OPENING, review) for review in reviews]
    assert scores == pytest.approx([0.760, 1.328, 1.667], abs=1e-3)


@pytest.mark.parametrize(
    ("plain", "negated"),
    [
        ("it is good.", "it is not good."),
        ("it fails.", "it never fails."),
        ("I recommend it to everyone.", "I cannot recommend it to everyone."),
        ("the cord is awful.", "the cord is not awful."),
    ],
)
def test_negation_flips_the_sentiment(plain: str, negated: str):
    assert sentiment("and", plain) * sentiment("and", negated) < 0


def test_negation_ends_with_its_clause():
    assert sentiment(OPENING, "it does not work, but the handle is great.") == 0  # -1 for "not work", +1 for "great"


def test_shuffled_words_score_lower():
    rng = random.Random(0)
    words = split_words(POSITIVE)
    for _ in range(20):
        assert gold_score(OPENING, " ".join(rng.sample(words, len(words)))) < gold_score(OPENING, POSITIVE) - 1


def test_truncated_review_scores_lower_than_the_whole_and_than_its_first_sentence():
    truncated = "it works perfectly. The handle is"
    assert gold_score(OPENING, truncated) < gold_score(OPENING, "it works perfectly. The handle is sturdy.") - 1
    assert gold_score(OPENING, truncated) < gold_score(OPENING, "it works perfectly. I love it.") - 1


@pytest.mark.parametrize("response", ["", " ", "."])
def test_empty_response_scores_lowest(response: str):
    assert gold_score(OPENING, response) < gold_score(OPENING, NEGATIVE)


def test_scores_stay_in_range_for_any_words():
    rng = random.Random(1)
    words = [*POLARITY, ".", ",", "not", "it", "is", "zebra"]
    for length in range(60):
        assert -3 <= gold_score(OPENING, " ".join(rng.choices(words, k=length))) <= 3


def test_continuation_must_fit_its_opening():
    assert gold_score("The cord of this lamp", "is great. I love it.") > gold_score(OPENING, "is great. I love it.")


# ---------------------------------------------------------------- grammar


def test_bigrams_hold_every_sampled_text(corpus: Corpus):
    clean = [pair["chosen"] for pair in corpus.eval_preferences if fluency(pair["prompt"], pair["chosen"]) == 1]
    assert len(clean) > 0.9 * len(corpus.eval_preferences)
    assert ("great", "great") not in grammar_bigrams()
    assert ("kettle", "it") not in grammar_bigrams()
    assert ("cord", "is") in grammar_bigrams()


def test_joining_undoes_splitting():
    assert join_words(split_words(MIXED)) == MIXED


def test_vocabulary_is_small(corpus: Corpus):
    assert 150 < len({word for text in texts(corpus) for word in split_words(text)}) < 400


# ---------------------------------------------------------------- corpus


def test_sizes_and_keys(corpus: Corpus):
    assert [len(part) for part in (corpus.preferences, corpus.eval_preferences)] == [13000, 300]
    assert [len(part) for part in (corpus.prompts, corpus.eval_prompts)] == [2000, 200]
    assert all(pair.keys() == {"prompt", "chosen", "rejected"} for pair in corpus.preferences + corpus.eval_preferences)
    assert all(row.keys() == {"prompt"} for row in corpus.prompts + corpus.eval_prompts)


def test_same_seed_same_corpus():
    sizes = {"pairs": 50, "eval_pairs": 10, "prompts": 20, "eval_prompts": 10}
    assert make_corpus(3, **sizes) == make_corpus(3, **sizes)
    assert make_corpus(3, **sizes) != make_corpus(4, **sizes)


def test_held_out_openings_never_occur_in_training(corpus: Corpus):
    train = {row["prompt"] for row in corpus.preferences + corpus.prompts}
    held_out = {row["prompt"] for row in corpus.eval_preferences + corpus.eval_prompts}
    assert not train & held_out
    assert {word for text in held_out for word in split_words(text)} <= {word for text in train for word in split_words(text)}


def test_prompts_are_distinct(corpus: Corpus):
    assert len({row["prompt"] for row in corpus.prompts}) == len(corpus.prompts)
    assert len({row["prompt"] for row in corpus.eval_prompts}) == len(corpus.eval_prompts)


def test_tenth_of_the_labels_is_flipped_in_training_and_none_in_evaluation(corpus: Corpus):
    def flips(pairs: list[dict[str, str]]) -> float:
        wrong = [gold_score(p["prompt"], p["chosen"]) < gold_score(p["prompt"], p["rejected"]) for p in pairs]
        return sum(wrong) / len(wrong)

    assert flips(corpus.preferences) == pytest.approx(0.1, abs=NOISE_TOLERANCE)
    assert flips(corpus.eval_preferences) == 0
    assert flips(make_corpus(0, 100, 1, 1, 1, label_noise=0).preferences) == 0


def test_scores_spread_widely_and_chosen_leaves_room(corpus: Corpus):
    chosen = [gold_score(pair["prompt"], pair["chosen"]) for pair in corpus.preferences]
    rejected = [gold_score(pair["prompt"], pair["rejected"]) for pair in corpus.preferences]
    assert statistics.pstdev(chosen + rejected) > 1
    assert statistics.mean(chosen) > statistics.mean(rejected) + 0.5
    best = gold_score(OPENING, POSITIVE)
    assert sum(score < best - 0.3 for score in chosen) / len(chosen) > 0.6


def test_reviews_are_short(corpus: Corpus):
    lengths = [len(split_words(text)) for text in texts(corpus)]
    assert 15 < statistics.mean(lengths) < 28
    assert max(lengths) < 80  # a damaged one may say everything twice


@pytest.mark.parametrize(
    ("setting", "message"), [({"prompts": 10**6}, "prompts=1000000"), ({"label_noise": 2.0}, "label_noise=2.0")]
)
def test_impossible_settings_are_refused(setting: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make_corpus(0, **setting)


# ---------------------------------------------------------------- tokenizer and model


def test_tokenizer_decodes_to_readable_text(corpus: Corpus, tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(texts(corpus), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in [f"{OPENING} {MIXED}", *texts(corpus)[:50]]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = [*tokenizer(POSITIVE)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == POSITIVE
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_held_out_openings_have_no_unknown_word(corpus: Corpus):
    tokenizer = train_tokenizer(texts(corpus))
    assert all(tokenizer.unk_token_id not in tokenizer(opening)["input_ids"] for opening in openings()[1])


def test_prompt_and_response_ids_join(corpus: Corpus):
    tokenizer = train_tokenizer(texts(corpus))
    joined = tokenizer(OPENING)["input_ids"] + tokenizer(MIXED)["input_ids"]
    assert tokenizer(f"{OPENING} {MIXED}")["input_ids"] == joined


def test_llama_config_is_small_and_fits_nf4_blocks():
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(build_llama_config(256))
    assert 4e5 < model.num_parameters() < 1e6
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(linear.in_features % 64 == 0 for linear in linears)
