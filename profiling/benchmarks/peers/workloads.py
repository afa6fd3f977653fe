"""What one PPO update consists of, and who takes part; standard library only, for it is read in every environment."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
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
        everyone: whether all contestants take part where none is named; else those in fp32 that our patch did not touch.
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
    everyone: bool = True

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


_TINY = Workload("tiny", 64, 128, 2, 4, 2, 500, rows=4, prompt_tokens=8, response_tokens=8, epochs=2, microbatch=2)
_W1 = Workload("W1", 512, 1536, 8, 8, 4, 32_000, rows=16, prompt_tokens=32, response_tokens=64, epochs=4, microbatch=4)
_W2 = Workload(
    *("W2", 256, 768, 4, 4, 4, 128_256),
    rows=8,
    prompt_tokens=128,
    response_tokens=384,
    epochs=1,
    microbatch=2,
    everyone=False,
)
WORKLOADS = {workload.name.lower(): workload for workload in (_TINY, _W1, _W2)}


@dataclass(frozen=True)
class Contestant:
    """A trainer and how it is set up.

    Attributes:
        script: the worker, beside this file.
        environment: where it runs: `hydra` (here), `trl112` or `trl011`.
        dtype: of the base's weights, fp32 or bf16.
        options: that the worker reads.
    """

    name: str
    script: str
    environment: str
    dtype: str
    options: dict[str, Any]

    @property
    def trunk_layers(self) -> int:
        """Layers below all adapters, which run once a rollout; 0 for the peers."""
        return self.options.get("trunk_layers", 0)

    @property
    def merged(self) -> bool:
        """Whether it is ours and decodes with merged copies of the weights, which are in bf16 whatever its type."""
        return self.options.get("weights") == "merged-bf16"

    @property
    def ours(self) -> bool:
        """Whether it is this package's own trainer, which announces its phases."""
        return self.script == "hydra_worker.py"

    @property
    def plain(self) -> bool:
        """Whether it is ours without what depends on the processor and the C library; takes part only where it is named."""
        return self.options.get("plain", False)

    @property
    def tuned(self) -> bool:
        """Whether it is a peer with our choice of kernel and allocator; takes part only where it is named."""
        return self.options.get("tuned", False)

    @property
    def patched(self) -> bool:
        """Whether it is a peer with our patch."""
        return self.options.get("patched", False)


def contestants(workload: Workload) -> dict[str, Contestant]:
    """Return all contestants by name: ours first, and those in fp32 before those in bf16.

    `hydra-plain` has what every library has here: torch's own kernel for fp32, and memory that the C library gives back.
    `trl112-full-tuned` and `trl112-lora-tuned` have what ours has: oneDNN for large products in fp32, and memory that is kept.
    """
    trunk = workload.trunk_layers
    base = (
        Contestant("hydra", "hydra_worker.py", "hydra", "fp32", {"trunk_layers": 0}),
        Contestant(f"hydra-trunk{trunk}", "hydra_worker.py", "hydra", "fp32", {"trunk_layers": trunk}),
        Contestant("hydra-merged", "hydra_worker.py", "hydra", "fp32", {"trunk_layers": 0, "weights": "merged-bf16"}),
        Contestant("trl112-full", "trl112_worker.py", "trl112", "fp32", {"lora": False, "patched": False}),
        Contestant("trl112-lora", "trl112_worker.py", "trl112", "fp32", {"lora": True, "patched": False}),
        Contestant("trl112-patched", "trl112_worker.py", "trl112", "fp32", {"lora": True, "patched": True}),
        Contestant("trl011-multi", "trl011_worker.py", "trl011", "fp32", {}),
    )
    half = tuple(replace(c, name=f"{c.name}-bf16", dtype="bf16") for c in base if not c.patched)
    plain = Contestant("hydra-plain", "hydra_worker.py", "hydra", "fp32", {"trunk_layers": 0, "plain": True})
    tuned = tuple(
        Contestant(
            f"trl112-{name}-tuned", "trl112_worker.py", "trl112", "fp32", {"lora": lora, "patched": False, "tuned": True}
        )
        for name, lora in (("full", False), ("lora", True))
    )
    return {contestant.name: contestant for contestant in (*base, *half, plain, *tuned)}


def by_default(workload: Workload) -> list[str]:
    """Return the names of the contestants that take part where none is named."""
    known = {name: c for name, c in contestants(workload).items() if not (c.plain or c.tuned)}
    return [name for name, c in known.items() if workload.everyone or (c.dtype == "fp32" and not c.patched)]


def matmul(dtype: str) -> Contestant:
    """Return what takes turns with the contestants to measure matrix products in a type."""
    return Contestant(f"matmul-{dtype}", "rates_worker.py", "hydra", dtype, {})
