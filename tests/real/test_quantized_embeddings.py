"""How far 8 and 4 bits move the log-probs of real text: SmolLM2-135M-Instruct on this project's README.

Bounds are the numbers of docs/notes.md, "Embeddings in 8 and 4 bits", and a fifth. `-s` prints what was found.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from examples.real_model.prepare import convert
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.model.quantized_embeddings import quantize_embeddings

TOKENS = 768
BOUNDS = {"int8": 0.03, "nf4": 0.6}
"""Nats, mean |difference|."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    convert(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("kind", BOUNDS)
def test_logprobs_of_real_text(kind, folder):
    from transformers import AutoModelForCausalLM

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids[: TOKENS + 1]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
        return token_logprobs(hidden, ids[:, 1:], head).logprobs

    weight = model.get_output_embeddings().weight
    states = model.model(ids[:, :-1]).last_hidden_state
    plain = logprobs(states, LMHead(weight))
    product = logprobs(states.bfloat16(), LMHead(weight.bfloat16()))
    quantize_embeddings(model, kind)
    held = LMHead(model.get_output_embeddings().weight)
    head_alone = logprobs(states, held)
    both = logprobs(model.model(ids[:, :-1]).last_hidden_state, held)
    away = {name: (found - plain).abs().mean().item() for name, found in (("head", head_alone), ("embedding and head", both))}
    rounding = (product - plain).abs().mean().item()
    print(f"\n{kind}: {away}; the product in bf16 alone: {rounding:.4f}")
    assert max(away.values()) < BOUNDS[kind]
    assert min(away.values()) > 0.001  # something was rounded
    if kind == "int8":  # no more than computing in bf16 does
        assert away["head"] < 1.5 * rounding
