"""The shared base and its adapters, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_ppo.config.fields import Quantization, expand_home, required, setting
from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the LoRA adapters. PPO copies the shape of a trained `sft` adapter and ignores these."""

    r: int = setting(16, "Rank of the adapters.")
    alpha: int = setting(32, "Scaling numerator: the update is alpha / r * B A.")
    target_modules: str | list[str] = setting(
        "all-linear", "Names of the linear layers to adapt, or all-linear for every one but the output head."
    )
    target_parameters: list[str] = setting(
        list,
        "Parameters of fused experts to adapt too, such as mlp.experts.down_proj; in a pass one layer's experts are then made "
        "anew, base and adapter added.",
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) instead of alpha / r.")
    actor_rank: int | None = setting(
        None, "ppo: rank of the actor's adapter, at the scale of the other ranks; null is that of what it starts from."
    )
    critic_rank: int | None = setting(None, "ppo: rank of the critic's adapter, likewise.")

    def __post_init__(self) -> None:
        _positive(self, "r", "alpha", "actor_rank", "critic_rank")
        _check(self, "target_modules", bool(self.target_modules), "names no layer", "use all-linear")


@dataclass(frozen=True)
class ModelSettings:
    """The shared base and how it is held in memory."""

    name_or_path: str = required(
        "A Hugging Face causal LM (hub name or local folder), or a folder written by this program (a run of sft or ppo)."
    )
    adapter: str | None = setting(
        None,
        "A LoRA folder of PEFT, trained elsewhere on this base (by TRL's SFTTrainer, say): what training starts from, and "
        "the reference. Not with a run of this program, which brings its own.",
    )
    quantization: Quantization | None = setting(None, "Quantise the base's linear layers: int8, nf4 or fp4; null keeps them.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Compute type; auto is the checkpoint's own on a GPU and fp32 on a CPU."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = setting(
        "auto",
        "Attention kernel; auto takes flash-attention where it is usable, of its package or of kernels, else SDPA, else the "
        "model's own.",
    )
    check: Literal["fast", "full", "off"] = setting(
        "fast",
        "Try the model's passes on a few tokens when it is built (causality, padding, modes, adapters, recomputing), and its "
        "decoding before the first rollout; full takes rows of some hundred tokens, off none.",
    )
    trunk_layers: int = setting(0, "Adapters sit on the layers above this many; the layers below are shared by all roles.")
    packing: bool = setting(
        True, "Run rows of different lengths end to end, so that no padding is computed, where the attention kernel can do it."
    )
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass instead of keeping them.")
    trust_remote_code: bool = setting(False, "Allow Python code shipped inside the model folder to run.")
    device: str = setting("auto", "Device of the base: auto, cpu, cuda or cuda:N.")
    lora: LoraSettings = setting(LoraSettings, "Shape of the LoRA adapters.")
    quantize_embeddings: Literal["int8", "nf4"] | None = setting(
        None, "Hold embeddings and output head in int8 (half their bytes) or nf4 (a quarter); null keeps them in model.dtype."
    )
    checkpoint_offload: bool = setting(
        False, "Keep what gradient checkpointing keeps of a layer, its input, in host memory until the layer is recomputed."
    )
    tile_tokens: int | None = setting(
        None, "Run MLPs, norms and the pass over prompts over pieces of this many tokens, so that long rows need less memory."
    )
    shard_base: bool = setting(
        False,
        "Where torchrun starts several processes: each holds a part of every decoder layer, and gathers one layer at a time. "
        "false gives everybody the whole base, which sends far less.",
    )

    def __post_init__(self) -> None:
        expand_home(self, "name_or_path", "adapter")
        _check(self, "name_or_path", bool(self.name_or_path), "is empty", "name a model or a folder")
        _not_negative(self, "trunk_layers")
        _positive(self, "tile_tokens")
        _check(
            self,
            "checkpoint_offload",
            self.gradient_checkpointing or not self.checkpoint_offload,
            "moves what gradient checkpointing keeps, and model.gradient_checkpointing=false keeps nothing of it",
            "set model.gradient_checkpointing=true, or leave checkpoint_offload out",
        )
        whole = not self.shard_base or self.tile_tokens is None
        rule = f"needs as many passes of every process, and with tile_tokens={self.tile_tokens} longer prompts take more"
        _check(self, "shard_base", whole, rule, "leave tile_tokens out")
