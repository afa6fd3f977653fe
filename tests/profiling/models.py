"""Small models of different families to profile, and workloads of theirs."""

from __future__ import annotations

from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from hydra_ppo.profiling.workload import Workload

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **{"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}

CONFIGS = {
    "llama": LlamaConfig(**SIZES, **IDS),
    "qwen3-tied": Qwen3Config(**SIZES, **IDS, head_dim=32, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=2000, n_embd=128, n_layer=4, n_head=4, n_positions=128, **IDS),
    "opt": OPTConfig(
        vocab_size=2000,
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=128,
        **IDS,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, **IDS, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2
    ),
}


def workload(**changes) -> Workload:
    sizes = {"model": "unused", "dtype": "fp32", "prompt": 24, "response": 12, "rollout_batch": 4, "rank": 8}
    return Workload(**(sizes | changes))
