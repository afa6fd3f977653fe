"""What is profiled: a model, how it is held, and the sizes of one PPO step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hydra_ppo.errors import ConfigError

QUANTIZATIONS = ("none", "int8", "nf4", "fp4")
KV_CACHES = ("auto", "int8")


@dataclass(frozen=True)
class Workload:
    """One PPO step on one model.

    Attributes:
        model: shipped name, folder or config.json.
        quantization: of the base's linear layers; None keeps them.
        dtype: compute type, in which an unquantised base is held.
        rank: of the adapters, on all linear layers.
        prompt, response: tokens of every prompt and of every response.
        rollout_batch: responses per PPO step, decoded together.
        minibatch: responses per optimizer step; None is the rollout batch.
        microbatch: responses per forward and backward pass.
        score_batch: responses per scoring pass.
        trunk_layers: adapters sit on the layers above this many.
        checkpointing: recompute activations in the backward pass.
        kv_cache: keys and values while sampling: auto in the compute type, or int8.
    """

    model: str
    quantization: Literal["int8", "nf4", "fp4"] | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    rank: int = 16
    prompt: int = 512
    response: int = 512
    rollout_batch: int = 8
    minibatch: int | None = None
    microbatch: int = 1
    score_batch: int = 1
    trunk_layers: int = 0
    checkpointing: bool = True
    kv_cache: Literal["auto", "int8"] = "auto"

    def __post_init__(self) -> None:
        for name in ("rank", "prompt", "response", "rollout_batch", "minibatch", "microbatch", "score_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; choose a positive number.")
        if self.trunk_layers < 0:
            raise ConfigError(f"trunk_layers={self.trunk_layers} must not be negative; use 0 or more.")
        if self.rollout_batch % (self.minibatch or self.rollout_batch):
            raise ConfigError(
                f"rollout_batch={self.rollout_batch} is not divisible by minibatch={self.minibatch}; choose a minibatch that "
                f"divides {self.rollout_batch}."
            )

    def settings(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def check_method(self, method: str) -> None:
        """Raise ConfigError where the method cannot be had with this workload."""
        if method == "full" and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization!r} leaves no weights that the method 'full' could train; leave 'full' out of "
                "methods, or quantization."
            )
