"""The reward head is read where it was trained, with real tokenizers and their families' templates."""

from __future__ import annotations

import pytest

from tests.hydra_ppo.training.test_ends import check_places
from tests.real.conftest import with_template

# Gemma's and Phi-3's tokens stand on SentencePiece files of the same make; theirs are in no package.
PLACES = (
    *(("v1-bare", "gemma3"), ("v1-prepend", "phi3"), ("v3-first", "chatml"), ("v1-prepend", "llama2"), ("v3-first", "mistral")),
    *(("v1-prepend", "zephyr"), ("smollm2", "smollm2")),
    # Vocabularies of 130 thousand and more take their time.
    *(pytest.param(*place, marks=pytest.mark.long) for place in (("llama3",) * 2, ("qwen", "qwen2.5"), ("tekken",) * 2)),
)


@pytest.mark.parametrize(("kind", "family"), PLACES)
def test_scores_are_read_where_they_were_trained(kind, family, tmp_path):
    tokenizer = with_template(kind, family)
    check_places(tokenizer, tmp_path, pad=0, train=48, epochs=2)
