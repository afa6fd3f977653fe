"""Tiny random models of every supported family, and data to run through them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from hydra_ppo.experience import Experience, Sequences

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def where_known(name: str, config_class: str, **settings: Any) -> dict[str, PretrainedConfig]:
    """A family that only newer versions of transformers have: one entry, or none."""
    made = getattr(transformers, config_class, None)
    return {name: made(**settings)} if made is not None else {}


# Versions before 4.53 read the pattern, later ones the types.
GEMMA3_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window_pattern": 2}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": MistralConfig(**COMMON, sliding_window=5),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    **where_known("qwen3", "Qwen3Config", **COMMON, head_dim=16),
    **where_known("gemma3", "Gemma3TextConfig", **COMMON, head_dim=16, sliding_window=5, **GEMMA3_LAYERS),
    **where_known(
        *("gemma3-softcap", "Gemma3TextConfig"),
        **COMMON,
        head_dim=16,
        sliding_window=64,
        final_logit_softcapping=2.0,
        **GEMMA3_LAYERS,
    ),
    "phi3": Phi3Config(**COMMON),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=64, **IDS),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        **IDS,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        **IDS,
    ),
    "opt-projected": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        **IDS,
    ),
}

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23, 24, 25, 26, 27]]
RESPONSES = [[31, 32, 33, 2], [41, 42, 43, 44, 45, 46], [51]]


def experience() -> Experience:
    """Three rows of different prompt and response lengths."""
    return Experience.from_lists(PROMPTS, RESPONSES, pad_id=0, device=torch.device("cpu"))


def sequences() -> Sequences:
    return experience().sequences()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give adapters and scalar heads of a HydraModel weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith("heads."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
