"""A tiny model of any family, from its config class alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, VOCABULARY, POSITIONS = 3, 97, 128

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "n_embed": 64,
    "dim": 64,
    "emb_dim": 64,
    "embedding_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_size": 32,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "dff": 96,
    "n_inner": 96,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "max_seq_len": POSITIONS,
    "max_sequence_length": POSITIONS,
    "max_target_positions": POSITIONS,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 4,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 4,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "first_k_dense_replace": 1,
    "logit_scale": 0.25,
    "logits_scaling": 4.0,
    "use_mamba_kernels": False,
}
"""What an attribute of that name becomes, wherever a config has one."""

ENCODERS = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Types whose classes are causal LMs where their config says so."""

EVERY_HEAD = {"num_key_value_heads": 4}  # latent attention has keys for each head
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

OF_FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3"), EVERY_HEAD),
    **dict.fromkeys(("glm4_moe_lite", "kimi_linear", "longcat_flash", "youtu", "bailing_hybrid"), EVERY_HEAD),
    **dict.fromkeys(("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), HYBRID),
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "deepseek_v2": EVERY_HEAD | {"num_experts_per_tok": 2, "topk_method": "greedy", "n_shared_experts": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * LAYERS},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "longcat_flash": EVERY_HEAD | {"num_layers": LAYERS},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 1.0},
}
"""What a family needs besides."""


def names() -> list[str]:
    """Return the model types that transformers maps to a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a config of this type whose model has few layers of small width."""
    kind = type(AutoConfig.for_model(model_type))
    return _shrunk(kind, model_type)


def _shrunk(kind: type[PretrainedConfig], model_type: str) -> PretrainedConfig:
    default = kind()
    settings: dict[str, Any] = {}
    accepted = inspect.signature(kind.__init__).parameters
    nested = getattr(kind, "sub_configs", {}) or {}
    for name, value in SMALL.items():
        if name in accepted and not (name not in ("num_key_value_heads", "head_dim") and getattr(default, name, None) is None):
            settings[name] = value
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers"):
        held = getattr(default, name, None)
        if name in accepted and isinstance(held, list) and held:
            seen = list(dict.fromkeys(held))
            settings[name] = (seen + [seen[-1]] * LAYERS)[:LAYERS] if len(seen) <= LAYERS else seen[:LAYERS]
    for name in nested:
        if name in accepted and getattr(default, name, None) is not None:
            held = getattr(default, name)
            settings[name] = _shrunk(type(held), held.model_type).to_dict()
    if model_type in ENCODERS and "is_decoder" in accepted:
        settings["is_decoder"] = True  # without it the class is no causal LM
    settings |= OF_FAMILY.get(model_type, {})
    return kind(**settings)


def tiny_model(model_type: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a model in fp32 whose every weight does something."""
    config = tiny_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wake(model, seed)
    return model.eval()


@torch.no_grad()
def wake(model: nn.Module, seed: int = 0) -> None:
    """Move every weight a little: biases of 0, norms of 1 and sinks that were never set would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        if not parameter.isfinite().all():
            parameter.zero_()
        if parameter.ndim >= 2 and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5 * 1.5)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
