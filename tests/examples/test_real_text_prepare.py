"""The pure parts of examples/real_text/prepare.py: prose, passages, splits, windows and damage."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

REAL_TEXT = Path(__file__).parents[2] / "examples" / "real_text"
DOCSTRING = """Return the handle of the open file.

The handle is a small number that the system gave out when the
file was opened (see "open()").  It stays valid until the file
is closed.

    >>> handle(f)
    3

mode      read or write
buffering size of the buffer

Text that belongs to the *second* half comes last, as one would expect.
"""


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_text_prepare", REAL_TEXT / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def passage_texts(count: int) -> list[str]:
    """Write passages of six sentences; every one has words of its own."""
    return [
        " ".join(f"Number {i}{c} holds {c}{i} and {c * 2}{i} of the things we count here." for c in "abcdef")
        for i in range(count)
    ]


def test_prose_keeps_sentences_and_drops_code_and_tables(prepare):
    assert prepare.prose(DOCSTRING) == [
        "Return the handle of the open file.",
        'The handle is a small number that the system gave out when the file was opened (see "open()"). '
        "It stays valid until the file is closed.",
        "Text that belongs to the second half comes last, as one would expect.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        ">>> spam(1) and then some more words.",
        "for_stmt ::= for target in starred_list and the rest.",
        "name     type     default     meaning of this column.",
        "Heading without an end that is long enough",
        "See https://example.org for the rest of the words.",
        "x = y + z, which is an assignment of sorts.",
    ],
)
def test_what_is_not_prose(prepare, text):
    assert prepare.prose(text) == []


def test_docstrings_are_found_and_broken_files_skipped(prepare):
    source = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Function."""\n'
    assert sorted(prepare.docstrings(source)) == ["Class.", "Function.", "Module."]
    assert list(prepare.docstrings("def broken(:")) == []


def test_tests_and_installed_packages_are_left_out(prepare, tmp_path):
    for name in ("a.py", "test/b.py", "site-packages/c.py", "json/tests/d.py", "json/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in prepare.stdlib_files(tmp_path)] == ["a.py", "json/e.py"]


def test_passages_hold_each_paragraph_once(prepare):
    found = prepare.passages([prepare.Passage("a", DOCSTRING), prepare.Passage("b", DOCSTRING)])
    assert [passage.document for passage in found] == ["a"]


def test_split_shares_neither_documents_nor_runs_of_words(prepare):
    found = [prepare.Passage(f"d{i // 2}", text) for i, text in enumerate(passage_texts(60))]
    found.append(prepare.Passage("copy", found[0].text))
    train, held_out = prepare.split(found, seed=0, eval_fraction=0.3)
    assert train
    assert held_out
    assert not {passage.document for passage in train} & {passage.document for passage in held_out}
    known = set().union(*(prepare.word_runs(passage.text) for passage in train))
    assert not any(prepare.word_runs(passage.text) & known for passage in held_out)
    assert prepare.split(found, seed=0, eval_fraction=0.3) == (train, held_out)


def test_sentences_do_not_begin_after_abbreviations(prepare):
    text = 'Use a flag, e.g. The first one. It "works." Then stop.'
    words = text.split()
    assert [words[i] for i in prepare.sentence_starts(words)[:-1]] == ["Use", "It", "Then"]


def test_windows_fit_their_limits_and_end_with_sentences(prepare):
    words = passage_texts(1)[0].split()
    starts = prepare.sentence_starts(words)
    lengths = [2] * len(words)
    chosen = prepare.windows(lengths, starts, random.Random(0))
    assert chosen
    for begin, cut, end in chosen:
        assert begin in starts
        assert end in starts
        assert prepare.PROMPT_TOKENS[0] <= 2 * (cut - begin) <= prepare.PROMPT_TOKENS[1]
        assert prepare.RESPONSE_TOKENS[0] <= 2 * (end - cut) <= prepare.RESPONSE_TOKENS[1]


def test_damage(prepare):
    response = " The first of many words stands here, and the last one ends the sentence."
    for seed in range(20):
        mixed = prepare.shuffled(response, random.Random(seed))
        assert mixed != response
        assert sorted(mixed.split()) == sorted(response.split())
        short = prepare.cut_off(response, random.Random(seed))
        assert response.startswith(short)
        assert 0.25 < len(short.split()) / len(response.split()) < 0.75
        assert short[-1].isalpha()


def test_pairs_come_in_equal_kinds_and_continue_their_prompt(prepare):
    texts = passage_texts(60)
    tokenizer = prepare.train_tokenizer(texts, vocab_size=600)
    found = [prepare.Passage(f"d{i}", text) for i, text in enumerate(texts)]
    pairs = prepare.make_pairs(found, tokenizer, seed=0)
    counts = [sum(pair["kind"] == kind for pair in pairs) for kind in prepare.KINDS]
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 10
    for pair in pairs:
        assert any(pair["prompt"] + pair["chosen"] in text for text in texts)
        assert pair["chosen"] != pair["rejected"]
        if pair["kind"] == "elsewhere":
            assert not any(pair["prompt"] + pair["rejected"] in text for text in texts)
    assert prepare.make_pairs(found, tokenizer, seed=0) == pairs


def test_tokenizer_joins_prompt_and_response_and_decodes(prepare):
    texts = passage_texts(20)
    tokenizer = prepare.train_tokenizer(texts, vocab_size=400)
    prompt, response = "Number 3a holds a3", " and aa3 of the things."
    joined = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
    assert tokenizer(prompt + response)["input_ids"] == joined
    assert tokenizer.decode(joined) == prompt + response
    assert (tokenizer.pad_token, tokenizer.eos_token) == (prepare.PAD, prepare.EOS)


def test_rows_hold_every_text_and_its_end(prepare):
    texts = passage_texts(5)
    tokenizer = prepare.train_tokenizer(texts, vocab_size=400)
    rows = prepare.pack(texts, tokenizer, 16)
    assert rows.shape[1] == 16
    tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    assert rows.numel() == tokens // 16 * 16
    assert abs(int((rows == tokenizer.eos_token_id).sum()) - len(texts)) <= 1


def test_base_fits_nf4_blocks(prepare):
    import torch
    from transformers import LlamaForCausalLM

    config = prepare.base_config(prepare.train_tokenizer(passage_texts(5), vocab_size=400))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(linear.in_features % 64 == 0 for linear in linears)


def test_learning_rate_rises_and_falls(prepare):
    training = prepare.Training(steps=100, learning_rate=1.0, warmup_fraction=0.1)
    rates = [prepare.learning_rate(step, training) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)  # 1 of 10 steps of warm-up
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.06


@pytest.mark.parametrize(("file", "kind"), [("sft.yaml", "SFTConfig"), ("ppo.yaml", "PPOConfig")])
def test_yaml_files_name_existing_settings(file, kind):
    import dataclasses
    import typing

    import yaml

    from hydra_ppo.config import settings as config

    def build(cls, values):
        hints = typing.get_type_hints(cls)
        return cls(**{k: build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})

    assert build(getattr(config, kind), yaml.safe_load((REAL_TEXT / file).read_text()))
