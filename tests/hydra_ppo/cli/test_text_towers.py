"""Checkpoints for text and images: the language model inside is the base, and what leaves keeps the names of the whole."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.cli.export import export_role
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.choice import decoder_of
from tests.families import randomise

TEXT = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
LLAMA4 = {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 32, "no_rope_layers": [1, 0]}
LLAMA4_EYES = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
WRAPPED = {
    "Gemma3": ({**TEXT, "sliding_window": 8}, EYES | PATCHES, {"mm_tokens_per_image": 4}),
    "Mistral3": ({**TEXT, "model_type": "mistral"}, EYES | PATCHES | {"model_type": "pixtral"}, {}),
    "Qwen2_5_VL": ({**TEXT, "rope_parameters": MROPE}, QWEN_EYES, {}),
    "Qwen2VL": ({**TEXT, "rope_parameters": MROPE}, {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}, {}),
    "Llama4": (TEXT | LLAMA4, EYES | PATCHES | LLAMA4_EYES, {}),
}


def build(name: str) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    text, eyes, more = WRAPPED[name]
    config = getattr(transformers, f"{name}Config")(text_config=dict(text), vision_config=dict(eyes), **more)
    return getattr(transformers, f"{name}ForConditionalGeneration"), config


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_language_model_is_the_base(name, tmp_path):
    whole_class, config = build(name)
    torch.manual_seed(0)
    plain = whole_class(config).eval()
    plain.save_pretrained(tmp_path / "base")
    model = HydraModel.from_pretrained(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad(), model.role("reference"):
        found = model.architecture.output_embeddings(model.hidden_states(ids))
        torch.testing.assert_close(found, plain(input_ids=ids).logits, rtol=0, atol=1e-5)
    with model.role("actor"):
        decoder_of(model)  # tries its decoding
    adapted = {key for key, _ in model.base.named_parameters() if "lora_" in key}
    assert adapted
    assert not any("vision" in key or "visual" in key for key in adapted)
    randomise(model, seed=1)
    model.save_pretrained(tmp_path / "run")
    with torch.no_grad(), model.role("actor"):
        expected = model.architecture.output_embeddings(model.hidden_states(ids))
    *_, wrote = export_role(tmp_path / "run", tmp_path / "out")
    export_role(tmp_path / "run", tmp_path / "adapter", adapter_only=True)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(tmp_path / "base/model.safetensors").keys()
    kind = getattr(transformers, wrote.partition("own: ")[2].partition(".")[0])
    for loaded in (
        whole_class.from_pretrained(tmp_path / "out"),
        kind.from_pretrained(tmp_path / "out"),
        PeftModel.from_pretrained(whole_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
