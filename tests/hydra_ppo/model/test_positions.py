"""How long a row may be: the verdict on each family is what the family does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, CodeGenConfig, GPTJConfig, LlamaConfig

from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.positions import check_length
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.plain_decoders import ModelCacheDecoder, RecomputingDecoder
from tests.families import COMMON, FAMILIES
from tests.training import llama

KNOWN = 64
SMALL = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}
CONFIGS = {
    **FAMILIES,
    "gpt-j": GPTJConfig(**SMALL, rotary_dim=8, n_positions=KNOWN),
    "codegen": CodeGenConfig(**SMALL, rotary_dim=8, n_positions=KNOWN),
    "bloom": BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
    "as many tokens as positions": llama(vocab_size=KNOWN),
    "as wide as it is long": llama(hidden_size=KNOWN),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_refused_where_the_model_would_fail(name):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert check_length(empty, KNOWN, "rows=64") is None
    full = AutoModelForCausalLM.from_config(CONFIGS[name])
    full(torch.zeros(1, KNOWN, dtype=torch.long))
    try:
        full(torch.zeros(1, KNOWN + 1, dtype=torch.long))
    except (IndexError, RuntimeError):
        with pytest.raises(ConfigError, match=r"rows=65 make rows of up to 65 tokens, .* 64 positions; lower them by 1 in all"):
            check_length(empty, KNOWN + 1, "rows=65")
    else:
        line = check_length(empty, KNOWN + 1, "rows=65")
        assert (line is None) == (name == "bloom")  # ALiBi has no positions to run out of
        assert line is None or "rows=65 make rows of up to 65 tokens, the model was trained for 64 positions" in line


def test_a_stretched_rotary_embedding_reaches_as_far_as_it_says():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llama(**(COMMON | {"rope_scaling": scaling})))
    assert check_length(empty, 256, "rows=256") is None
    assert "trained for 256 positions" in (check_length(empty, 257, "rows=257") or "")


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "longrope"}])
def test_a_rotary_embedding_that_follows_the_longest_row(rope):
    """Beyond what was trained first its angles are those of the longest row, and so are all numbers of its neighbours."""
    half = 8
    if rope["rope_type"] == "longrope":
        rope = rope | {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "original_max_position_embeddings": 32}
    config = LlamaConfig(
        **COMMON | {"max_position_embeddings": 128 if "short_factor" in rope else 32},
        rope_parameters=rope | {"rope_theta": 1e4},
    )
    model = HydraModel.from_config(config)
    with torch.no_grad(), model.role("actor"):
        model.hidden_states(torch.ones(2, 32, dtype=torch.long))
        with pytest.raises(UnsupportedModelError, match=r"batch of width 33: beyond 32 the model's rotary embedding"):
            model.hidden_states(torch.ones(2, 33, dtype=torch.long))
        for decoder in (Decoder, ModelCacheDecoder, RecomputingDecoder):
            with pytest.raises(UnsupportedModelError, match=r"batch of width 33: beyond 32"):
                decoder(model, [[5] * 30, [6] * 3], 3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert check_length(model, 32, "settings") is None
    with pytest.raises(ConfigError, match=r"rows of up to 40 tokens; beyond 32 .* is that of the longest row.*lower them by 8"):
        check_length(model, 40, "settings")
