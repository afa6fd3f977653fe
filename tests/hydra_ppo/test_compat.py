"""What the library asks of whatever versions are installed. The families' own tests say that the numbers are right."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from hydra_ppo import compat
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.sampling import sample
from tests.families import FAMILIES, PROMPTS, randomise
from tests.hydra_ppo.rollout.test_collect import CLOSE, generator, logprobs_by_pass, settings
from tests.training import llama, write_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_comes_in_the_type_that_is_asked_for(dtype, tmp_path):
    assert AutoModelForCausalLM.from_config(llama(), **compat.dtype_option(dtype)).dtype == dtype
    folder = write_model(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(folder, **compat.dtype_option(dtype)).dtype == dtype


def test_the_stored_type_is_read_back(tmp_path):
    AutoModelForCausalLM.from_config(llama(), **compat.dtype_option(torch.bfloat16)).save_pretrained(tmp_path)
    assert compat.stored_dtype(transformers.AutoConfig.from_pretrained(tmp_path)) == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **compat.dtype_option("auto")).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_parts(family):
    architecture = HydraModel.from_config(FAMILIES[family]).architecture
    assert len(architecture.layers) == len(architecture.layer_types) == 3
    sliding = {"mistral": [True] * 3, "gemma3": [True, False, True], "gemma3-softcap": [True, False, True]}
    expected = sliding.get(family, [False] * 3)
    assert architecture.layer_types == ["sliding_attention" if s else "full_attention" for s in expected]
    compat.check_positions(architecture.backbone)


GEMMA2 = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "attn_logit_softcapping": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_layers_that_cut_masks_by_columns_decode_over_holes():
    """Gemma 2 has alternating windows since 4.42: in 4.46 each layer makes its own of the one mask that there is."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**GEMMA2)
    model = HydraModel(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))  # 5.x refuses sdpa
    randomise(model)
    assert model.architecture.sliding_windows() == {"sliding_attention": 5, "full_attention": None}
    out = sample(model, PROMPTS * 2, settings(), list(range(2, 20)), generator())
    expected = logprobs_by_pass(model, PROMPTS * 2, out.responses, 0.8)
    for found, wanted in zip(out.logprobs, expected, strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.architecture.layers)


def test_a_backbone_without_positions_has_no_holes_in_its_cache():
    model = HydraModel(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2)))
    with pytest.raises(UnsupportedModelError, match="takes no position_ids"):
        Decoder(model, PROMPTS, 4)
    out = sample(model, PROMPTS, settings(), [2], generator())
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, PROMPTS, out.responses, 0.8), strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)


def test_flash_attention_in_the_layers_is_refused_by_sampling():
    model = HydraModel.from_config(llama())
    layer = model.architecture.layers[0].self_attn
    layer.__class__ = type("LlamaFlashAttention2", (type(layer),), {})
    with pytest.raises(UnsupportedModelError, match="was built with flash-attention in its layers"):
        sample(model, [[5]], settings(), [2], generator())


def test_int8_layers_keep_what_peft_asks_for_in_copies():
    model = HydraModel.from_config(llama(), quantization="int8").causal_lm
    for module in copy.deepcopy(model).modules():
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):
            assert module.state.memory_efficient_backward is False or module.state.memory_efficient_backward is None


def test_inputs_that_a_model_does_not_take_are_left_out():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    given = {"input_ids": torch.ones(1), "attention_mask": torch.ones(1), "token_type_ids": torch.zeros(1)}
    assert list(compat.accepted_inputs(Model(), given)) == ["input_ids", "attention_mask"]


def test_trackers_start_once():
    calls = []
    compat.start_tracker(SimpleNamespace(start=lambda: calls.append(1)))
    compat.start_tracker(SimpleNamespace())
    assert calls == [1]
