"""What is profiled: a model, how it is held, and the sizes of one PPO step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hydra_ppo.errors import ConfigError

QUANTIZATIONS = ("none", "int8", "nf4", "fp4")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "adamw-offloaded")
UPDATE_ORDERS = ("together", "in-turn")
KV_CACHES = ("auto", "int8")
ROLLOUT_WEIGHTS = ("shared", "merged-bf16")
ADVANTAGES = ("gae", "group", "rloo", "reinforce")
REWARD_LOSSES = ("bradley-terry", "divergent", "margin", "advantage")


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
        quantize_embeddings: how embeddings and output head are held; None keeps them in the compute type.
        optimizer: how AdamW keeps its moments: `optimizer.name` of the program.
        update_order: actor and critic together, or in-turn.
        offload_in_rollout: the moments leave the device while responses are sampled and scored.
        checkpoint_offload: keep the layers' inputs, which checkpointing keeps, in host memory.
        tile_tokens: run MLPs, norms and the pass over prompts over pieces of this many tokens; None is all at once.
        kv_cache: keys and values while sampling: auto in the compute type, or int8.
        rollout_weights: what decoding multiplies with: the base and adapter, or copies of both in one.
        advantage: gae, or one of those that need no critic.
        ema: keep a running mean of the actor's adapter.
        ptx: practise as many answers, of these lengths, at each optimizer step; rehearsal holds the same.
        world: processes that share the work out; batches are those of all. A profile is rank 0's, which has most to do.
        shard_base: each process holds a part of every decoder layer.
        reward_heads: members of the reward head.
        reward_loss: of reward modelling; in PPO, whether there is a head of the expected reward (advantage).
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
    quantize_embeddings: Literal["int8", "nf4"] | None = None
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adamw-offloaded"] = "adamw"
    update_order: Literal["together", "in-turn"] = "together"
    offload_in_rollout: bool = False
    checkpoint_offload: bool = False
    tile_tokens: int | None = None
    kv_cache: Literal["auto", "int8"] = "auto"
    rollout_weights: Literal["shared", "merged-bf16"] = "shared"
    advantage: Literal["gae", "group", "rloo", "reinforce"] = "gae"
    ema: bool = False
    ptx: bool = False
    world: int = 1
    shard_base: bool = False
    reward_heads: int = 1
    reward_loss: Literal["bradley-terry", "divergent", "margin", "advantage"] = "bradley-terry"

    def __post_init__(self) -> None:
        rows = ("rollout_batch", "minibatch", "microbatch", "score_batch")
        for name in ("rank", "prompt", "response", *rows, "tile_tokens", "world", "reward_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; choose a positive number.")
        for name in ("rollout_batch", "minibatch"):
            if (value := getattr(self, name)) is not None and value % self.world:
                raise ConfigError(f"{name}={value} is not a multiple of world={self.world}; choose one that is.")
        if self.shard_base:
            self._check_shared_out()
        if self.trunk_layers < 0:
            raise ConfigError(f"trunk_layers={self.trunk_layers} must not be negative; use 0 or more.")
        if self.checkpoint_offload and not self.checkpointing:
            raise ConfigError(
                "checkpoint_offload=True moves what checkpointing keeps, and checkpointing=False keeps nothing of it; use "
                "checkpointing, or leave checkpoint_offload out."
            )
        if self.rollout_batch % (self.minibatch or self.rollout_batch):
            raise ConfigError(
                f"rollout_batch={self.rollout_batch} is not divisible by minibatch={self.minibatch}; choose a minibatch that "
                f"divides {self.rollout_batch}."
            )

        if self.advantage != "gae" and self.update_order == "in-turn":
            raise ConfigError(
                f"update_order='in-turn' steps the actor before the critic, and advantage={self.advantage!r} has none; leave "
                "it out."
            )
        if self.advantage in ("group", "rloo") and self.rollout_batch < 2:
            raise ConfigError(
                f"rollout_batch={self.rollout_batch} leaves advantage={self.advantage!r} nothing to compare a response with; "
                "choose at least 2."
            )
        if self.offload_in_rollout and self.optimizer in ("paged-adamw-8bit", "adamw-offloaded"):
            raise ConfigError(
                f"offload_in_rollout=True has nothing to do with optimizer={self.optimizer!r}, whose moments are in host "
                "memory already; leave it out."
            )

    def _check_shared_out(self) -> None:
        wrong = {
            "world=1 has nobody to share the base out with": self.world == 1,
            "quantization='int8' cannot be shared out": self.quantization == "int8",
            f"tile_tokens={self.tile_tokens} makes unequal numbers of passes": self.tile_tokens is not None,
        }
        for what, there in wrong.items():
            if there:
                raise ConfigError(f"shard_base=True: {what}; leave one of them out.")

    def settings(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def check_method(self, method: str) -> None:
        """Raise ConfigError where the method cannot be had with this workload."""
        for name, there in {"advantage": self.advantage != "gae", "ema": self.ema, "ptx": self.ptx}.items():
            if there and method != "hydra":
                raise ConfigError(f"{name}={getattr(self, name)!r} is of the method 'hydra'; leave {method!r} out of methods.")
        if method == "full" and self.quantize_embeddings is not None:
            raise ConfigError(
                f"quantize_embeddings={self.quantize_embeddings!r} leaves embeddings that the method 'full' could not train; "
                "leave 'full' out of methods, or quantize_embeddings."
            )
        if method == "full" and self.shard_base:
            raise ConfigError(
                "shard_base=True shares out a frozen base, and the method 'full' trains it; leave 'full' out of methods."
            )
        if method == "full" and self.quantization is not None:
            raise ConfigError(
                f"quantization={self.quantization!r} leaves no weights that the method 'full' could train; leave 'full' out of "
                "methods, or quantization."
            )
        if method == "j-hydra" and self.update_order == "in-turn":
            raise ConfigError(
                "update_order='in-turn' steps the actor before the critic, and those of the method 'j-hydra' share an adapter; "
                "leave 'j-hydra' out of methods, or update_order."
            )

    def check_stage(self, stage: str) -> None:
        """Raise ConfigError where the workload has settings of PPO alone and another stage is asked for."""
        given = {"update_order": self.update_order != "together", "offload_in_rollout": self.offload_in_rollout}
        given |= {"advantage": self.advantage != "gae", "ema": self.ema, "ptx": self.ptx}
        for name, there in given.items():
            if there and stage != "ppo":
                raise ConfigError(f"{name}={getattr(self, name)!r} has nothing to do in stage={stage!r}; leave it out.")
