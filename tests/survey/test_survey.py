"""A few kinds of the survey in every run of the tests; `make families` tries all."""

from __future__ import annotations

import pytest

from tests.survey.__main__ import HOW, Line, examine, page
from tests.survey.tiny import names

KINDS = {
    "llama": "Decoder",
    "deepseek_v3": "Decoder",  # fused experts, and a first layer whose MLP bears their names
    "laguna": "Decoder",  # names that PEFT loses when it loads an adapter
    "phimoe": "Decoder",  # noise in training mode, routers that are no linear layers
    "gemma3n_text": "Decoder",  # another path in training mode
    "falcon": "Decoder",  # adds in place to what an adapter returned
    "cohere": "Decoder",  # scaled logits
    "minicpm3": "Decoder",  # scaled states before the head
    "gemma3": "Decoder",  # a tower for images beside the language model
    "bart": "ModelCacheDecoder",
    "granitemoehybrid": "ModelCacheDecoder",
}


@pytest.mark.parametrize("model_type", KINDS)
def test_exact(model_type):
    line = examine(model_type)
    assert (line.outcome, line.text.partition(" (")[0]) == ("exact", HOW[KINDS[model_type]])


@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet"])
def test_refused(model_type):
    assert examine(model_type).outcome == "refused"


def test_the_page_has_a_line_for_each():
    lines = [Line(name, "exact" if i else "refused", "so | so", 1.0) for i, name in enumerate(names())]
    text = page(lines)
    assert all(f"| `{name}` | " in text for name in names())
    assert f"| exact | {len(lines) - 1} |" in text
    assert "**refused**: so \\| so" in text
