"""Shapes of well-known models, so that nothing has to be downloaded to simulate them; facts from their published configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError

LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
QWEN_2 = {"model_type": "qwen2", "rope_theta": 1000000.0, "max_position_embeddings": 32768}


def _layers(count: int, hidden: int, inner: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": count,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
    | _layers(32, 4096, 11008, 32, 32),
    "llama-3.1-8b": LLAMA_3 | _layers(32, 4096, 14336, 32, 8),
    "llama-3.1-70b": LLAMA_3 | _layers(80, 8192, 28672, 64, 8),
    "llama-3.1-405b": LLAMA_3 | _layers(126, 16384, 53248, 128, 8),
    "llama-3.2-1b": LLAMA_3 | _layers(16, 2048, 8192, 32, 8) | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": LLAMA_3 | _layers(28, 3072, 8192, 24, 8) | {"head_dim": 128, "tie_word_embeddings": True},
    "qwen2.5-0.5b": QWEN_2 | _layers(24, 896, 4864, 14, 2) | {"vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": QWEN_2 | _layers(28, 3584, 18944, 28, 4) | {"vocab_size": 152064, "tie_word_embeddings": False},
    "qwen2.5-32b": QWEN_2 | _layers(64, 5120, 27648, 40, 8) | {"vocab_size": 152064, "tie_word_embeddings": False},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
    | {"max_position_embeddings": 40960, "rope_theta": 1000000.0}
    | _layers(36, 4096, 12288, 32, 8),
    "mistral-7b": {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None}
    | _layers(32, 4096, 14336, 32, 8),
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }
    | _layers(34, 2560, 10240, 8, 4),
    "opt-1.3b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
}
"""Hugging Face config fields by name."""


HUB_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama/Llama-3.1-405B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "opt-1.3b": "facebook/opt-1.3b",
    "gpt2": "openai-community/gpt2",
}
"""Where the weights of these are."""


def shipped_name(name: str) -> str | None:
    """Return under which name the shape of a model is shipped: its own, or that of a hub name, tuned or not; None of others."""
    if name.lower() in SHAPES:
        return name.lower()
    return {_untuned(hub): shape for shape, hub in HUB_NAMES.items()}.get(_untuned(name))


def _untuned(hub: str) -> str:
    """Return a hub name without what tells a tuned model, which has the same shape, from its base."""
    return re.sub(r"-(instruct|it|pt|chat|base|hf)(?=-|$)", "", hub.lower())


def model_config(name: str) -> Any:
    """Return the Hugging Face config of a shipped name or its name on the hub, a local folder or a config.json.

    Raises:
        ConfigError: when it is none of these, or not the config of a known family.
    """
    from transformers import AutoConfig

    if (shipped := shipped_name(name)) is not None:
        fields = dict(SHAPES[shipped])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model={name!r} is no shipped name, folder or config.json; choose among {', '.join(SHAPES)} or name a file."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.pop("model_type")
        fields.pop("quantization_config", None)  # --quantization says how the base is held
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model={name!r} is not a model's config ({reason[:160]}); name one with a model_type.") from error
