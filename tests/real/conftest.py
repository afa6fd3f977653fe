"""Real tokenizers, each loaded once for a whole run."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.real.convert import folder_of
from tests.real.templates import FAMILIES

NATIVE = (
    *(("v1-prepend", family) for family in ("llama2", "mistral", "zephyr", "phi3", "chatml")),
    *(("v1-always", family) for family in ("llama2", "phi3", "zephyr")),
    *(("v1-bare", family) for family in ("gemma3",)),
    *(("v3-first", family) for family in ("mistral", "chatml", "gemma3")),
    *(("tekken", family) for family in ("tekken", "chatml")),
    *(("llama3", family) for family in ("llama3", "chatml")),
    ("llama4", "llama4"),
    *(("qwen", family) for family in ("qwen2.5", "phi3")),
    ("smollm2", "smollm2"),
)
"""Tokenizers with the templates of models that have them, or that people put on them.

Gemma's and Phi-3's files are not in a package: their tokens are put on Mistral's SentencePiece, which is of the same make.
"""


@cache
def loaded(kind: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer as a user would, from its folder."""
    return AutoTokenizer.from_pretrained(folder_of(kind))


@cache
def with_template(kind: str, name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a family's chat template, and those of its turn tokens that its file lacks."""
    tokenizer, family = copy.deepcopy(loaded(kind)), FAMILIES[name]
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in family.turns if token not in known]})
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.hookimpl(tryfirst=True)  # before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.real)
