"""What one PPO update consists of, and who takes part; standard library only, for it is read in every environment."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

LEARNING_RATE = 1e-5
KL_COEF = 0.05
LORA_RANK = 16
LORA_ALPHA = 32


@dataclass(frozen=True)
class Workload:
    """One PPO update of a random Llama; the minibatch is the whole rollout.

    Attributes:
        rows: prompts, with one response each.
        prompt_tokens, response_tokens: length of every prompt and of every response.
        epochs: passes over the rollout, each with one optimizer step.
        microbatch: rows per forward and backward pass.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    prompt_tokens: int
    response_tokens: int
    epochs: int
    microbatch: int

    @property
    def end_token(self) -> int:
        """One past the vocabulary: it cannot be sampled, so every response has its full length."""
        return self.vocabulary

    @property
    def trunk_layers(self) -> int:
        """Layers of the contestant with a shared trunk: half of them."""
        return self.layers // 2

    def llama(self) -> dict[str, Any]:
        """Return the arguments of LlamaConfig, without tokens that end or pad a response."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.prompt_tokens + self.response_tokens,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def prompts(self, count: int) -> list[list[int]]:
        """Return token ids of `count` prompts, the same ones each time."""
        source = random.Random(0)
        return [[source.randrange(self.vocabulary) for _ in range(self.prompt_tokens)] for _ in range(count)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", 64, 128, 2, 4, 2, 500, rows=4, prompt_tokens=8, response_tokens=8, epochs=2, microbatch=2),
        Workload("w1", 512, 1536, 8, 8, 4, 32_000, rows=16, prompt_tokens=32, response_tokens=64, epochs=4, microbatch=4),
        Workload("w2", 256, 768, 4, 4, 4, 128_256, rows=8, prompt_tokens=128, response_tokens=384, epochs=1, microbatch=2),
    )
}


@dataclass(frozen=True)
class Contestant:
    """A trainer and how it is set up.

    Attributes:
        script: the worker, beside this file.
        environment: where it runs: `hydra` (here), `trl112` or `trl011`.
        options: that the worker reads.
    """

    name: str
    script: str
    environment: str
    options: dict[str, Any]


def contestants(workload: Workload) -> dict[str, Contestant]:
    """Return all contestants by name, ours first."""
    trunk = workload.trunk_layers
    found = (
        Contestant("hydra", "hydra_worker.py", "hydra", {"trunk_layers": 0}),
        Contestant(f"hydra-trunk{trunk}", "hydra_worker.py", "hydra", {"trunk_layers": trunk}),
        Contestant("trl112-full", "trl112_worker.py", "trl112", {"lora": False, "patched": False}),
        Contestant("trl112-lora", "trl112_worker.py", "trl112", {"lora": True, "patched": False}),
        Contestant("trl112-patched", "trl112_worker.py", "trl112", {"lora": True, "patched": True}),
        Contestant("trl011-multi", "trl011_worker.py", "trl011", {}),
    )
    return {contestant.name: contestant for contestant in found}
