"""Every setting of the two trainers, as frozen dataclasses.

Each field carries its help text in ``metadata["help"]``; the command line, ``--print-config`` and the
docs all read it from there. Checks that involve one dataclass stand in its ``__post_init__``. This module
imports neither torch nor transformers, so that ``hydra-ppo --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hydra_ppo.config.fields import Quantization, expand_home, required, setting
from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import fraction as _fraction
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.rewards import RewardSettings
from hydra_ppo.config.rewards import RewardSource as RewardSource  # so that all settings are found here
from hydra_ppo.config.rollout import RolloutSettings as RolloutSettings
from hydra_ppo.config.vllm import VLLMSettings as VLLMSettings
from hydra_ppo.errors import ConfigError

ROW_COLUMNS = ("prompt", "chosen", "rejected", "messages", "responses", "ratings", "tools", "chat_template_kwargs")
"""Columns of a row that are read; all others are handed to reward functions."""
TEMPLATE_OPTIONS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""What `apply_chat_template` decides itself, and no setting or row may."""


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

    def __post_init__(self) -> None:
        _positive(self, "r", "alpha")
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
        "Attention kernel; auto takes flash-attention where it is installed and usable, else SDPA, else the model's own.",
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


@dataclass(frozen=True)
class DataSettings:
    """Where examples come from and how long they may be."""

    train: str = required("Training data: a .jsonl, .json, .csv or .parquet file, or a hub dataset (name or name:config).")
    eval: str | None = setting(None, "Held-out data of the same kind; null splits eval_fraction off the training data.")
    split: str = setting("train", "Split to read when the training data is a hub dataset.")
    eval_split: str = setting("test", "Split to read when the held-out data is a hub dataset.")
    eval_fraction: float = setting(0.05, "Share of the training data held out when no eval data is given.")
    columns: dict[str, str] = setting(
        dict, "Your names of columns, by ours: {prompt: question, chosen: response_j}; completions.text goes into lists."
    )
    format: Literal["pairs", "ranked", "rated"] = setting(
        "pairs", "sft: chosen and rejected in each row, a list of responses with the best first, or responses and ratings."
    )
    pairs_per_prompt: int | None = setting(
        None, "Most pairs of a ranked or rated row, those furthest apart first; null takes every two responses."
    )
    max_prompt_tokens: int = setting(512, "Longest prompt, in tokens.")
    max_response_tokens: int = setting(512, "Longest chosen or rejected response of a preference pair, in tokens.")
    long_prompts: Literal["error", "drop", "truncate"] = setting(
        "truncate", "A prompt over the limit: stop, drop the row, or keep its last max_prompt_tokens tokens."
    )
    skip_bad_rows: bool = setting(False, "Drop and count malformed rows instead of stopping at them.")
    degenerate_pairs: Literal["drop", "error"] = setting(
        "drop", "Pairs whose answers are equal, or one of which is empty: drop and count them, or stop."
    )
    end_of_turn: str | None = setting(
        None, "The token that ends an answer, such as <|im_end|>; null takes what the chat template puts there, else eos."
    )
    special_tokens: Literal["hide", "show"] = setting(
        "hide", "Whether reward functions and classifiers see special tokens inside answers, such as <think>."
    )
    chat_template_kwargs: dict[str, Any] = setting(dict, "Handed to the chat template, such as {enable_thinking: false}.")

    def __post_init__(self) -> None:
        expand_home(self, "train", "eval")
        _check(self, "end_of_turn", self.end_of_turn != "", "is empty", "name a token, or leave it null")
        _check(self, "train", bool(self.train), "is empty", "name a file or a dataset")
        _positive(self, "max_prompt_tokens", "max_response_tokens", "pairs_per_prompt")
        unknown = next((name for name in self.columns if name not in ROW_COLUMNS), None)
        rule = f"has the key {unknown!r}, which is no column that is read"
        _check(self, "columns", unknown is None, rule, f"use {', '.join(ROW_COLUMNS)}")
        names = list(self.columns.values())
        _check(self, "columns", len(set(names)) == len(names), "takes one column twice", "give each name one column")
        reserved = next((name for name in self.chat_template_kwargs if name in TEMPLATE_OPTIONS), None)
        remedy = "hand on only what the template itself reads"
        _check(self, "chat_template_kwargs", reserved is None, f"sets {reserved!r}, which is not the template's", remedy)
        _check(self, "eval_fraction", 0 <= self.eval_fraction < 1, "must lie in [0, 1)", "choose for example 0.05")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    weight_decay: float = setting(0.0, "Decoupled weight decay.")
    beta1: float = setting(0.9, "Decay of AdamW's first moment.")
    beta2: float = setting(0.95, "Decay of AdamW's second moment.")
    eps: float = setting(1e-8, "AdamW's denominator offset.")
    max_grad_norm: float | None = setting(1.0, "Clip the gradient norm to this; null clips nothing.")
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "Learning rate after the warm-up.")
    warmup_fraction: float = setting(0.0, "Share of the optimizer steps over which the learning rate rises from 0.")
    name: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adamw-offloaded"] = setting(
        "adamw",
        "How AdamW keeps its moments: fp32 on the device; bitsandbytes' 8 bits (parameters of fewer than 4096 numbers stay "
        "fp32), paged by CUDA or not; or in host memory, a few MiB at a time on the device, with adamw's bits.",
    )
    offload_in_rollout: bool = setting(
        False, "ppo: keep the moments in host memory while responses are sampled and scored; the bits are the same."
    )

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps", "max_grad_norm")
        idle = self.name in ("paged-adamw-8bit", "adamw-offloaded")
        rule = f"has nothing to do with name={self.name!r}, whose moments are in host memory already"
        _check(self, "offload_in_rollout", not (self.offload_in_rollout and idle), rule, "leave it false")
        _not_negative(self, "weight_decay")
        _fraction(self, "warmup_fraction")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)", "choose for example 0.9")


@dataclass(frozen=True)
class RunSettings:
    """The run folder and what is written to it."""

    output: str = required("Run folder: config.yaml, metrics.jsonl, samples.jsonl, plots, adapters and heads go there.")
    seed: int = setting(0, "Seed of every random source.")
    overwrite: bool = setting(False, "Replace what an earlier run left in the output folder.")
    log_every: int = setting(1, "Write metrics every this many steps.")
    save_every: int = setting(50, "Write a checkpoint every this many steps; 0 writes only at the end.")
    keep_last: int = setting(2, "Newest checkpoints kept on disk.")
    keep_best: int = setting(1, "Checkpoints kept besides: those with the best held-out score (ppo) or loss (sft).")
    trackers: list[Literal["tensorboard", "wandb"]] = setting(list, "Also log to these, through accelerate.")
    project: str = setting("hydra-ppo", "Project name that the trackers show.")
    memory: Literal["auto", "always", "never"] = setting(
        "auto", "Measure peak memory by phase: auto is every step on a GPU and the first two steps on a CPU."
    )
    progress: bool = setting(True, "Show progress bars and sample tables.")
    rank_timeout: float = setting(
        1800.0,
        "Where torchrun starts several processes: seconds that they wait for each other, such as for rewards, which rank 0 "
        "alone asks for.",
    )

    def __post_init__(self) -> None:
        expand_home(self, "output")
        _check(self, "output", bool(self.output), "is empty", "name a folder, for example runs/my-run")
        _positive(self, "log_every", "keep_last", "rank_timeout")
        _not_negative(self, "save_every", "keep_best", "seed")


@dataclass(frozen=True)
class SFTConfig:
    """Joint supervised fine-tuning and reward modelling on preference pairs."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    optimizer: OptimizerSettings = setting(OptimizerSettings, "AdamW and its schedule.")
    method: Literal["lora", "full"] = setting("lora", "Train a LoRA adapter over the frozen base, or the base itself.")
    sft_coef: float = setting(
        1.0, "Weight of the cross-entropy on the chosen response; 0 trains the reward model alone, in an adapter of its own."
    )
    reward_coef: float = setting(
        0.1, "Weight of the ranking loss -log sigmoid(r_chosen - r_rejected); 0 trains the SFT model alone."
    )
    adapter: str = setting("sft", "Name of the adapter to train; 'reward' makes a reward model of its own beside 'sft'.")
    epochs: int = setting(1, "Passes over the training pairs.")
    max_steps: int | None = setting(None, "Stop after this many optimizer steps.")
    batch_size: int = setting(32, "Preference pairs per optimizer step.")
    microbatch_size: int = setting(4, "Preference pairs per forward and backward pass.")
    eval_every: int = setting(50, "Evaluate on held-out pairs every this many steps.")
    eval_pairs: int = setting(256, "Held-out pairs used per evaluation.")

    def __post_init__(self) -> None:
        _not_negative(self, "sft_coef", "reward_coef")
        _positive(self, "epochs", "max_steps", "batch_size", "microbatch_size", "eval_every", "eval_pairs")
        if self.sft_coef == 0 and self.reward_coef == 0:
            raise ConfigError("sft_coef=0 and reward_coef=0 leave nothing to train; set at least one above 0.")
        if self.method == "full" and self.model.quantization is not None:
            raise ConfigError(
                f"method='full' cannot train a base with model.quantization={self.model.quantization!r}; "
                "use method='lora' or model.quantization=null."
            )
        if self.method == "full" and self.model.quantize_embeddings is not None:
            raise ConfigError(
                f"method='full' cannot train a base with model.quantize_embeddings={self.model.quantize_embeddings!r}; "
                "use method='lora' or model.quantize_embeddings=null."
            )
        if self.optimizer.offload_in_rollout:
            raise ConfigError(
                "optimizer.offload_in_rollout=True has nothing to do in sft, which samples nothing; leave it false."
            )
        if self.adapter not in ("sft", "reward"):
            raise ConfigError(f"adapter={self.adapter!r} is not a trainable adapter of this stage; choose 'sft' or 'reward'.")
        if self.adapter == "reward" and self.sft_coef != 0:
            raise ConfigError(f"adapter='reward' trains a reward model alone, but sft_coef={self.sft_coef}; set sft_coef=0.")
        if self.adapter == "reward" and self.method == "full":
            raise ConfigError(
                "adapter='reward' with method='full' would change the base under the sft adapter; use method='lora'."
            )

    @property
    def stage(self) -> Literal["base", "reward", "sft"]:
        """What is trained: the base, or the adapter of that name. A reward model alone never is in the reference's adapter."""
        if self.method == "full":
            return "base"
        return "reward" if self.sft_coef == 0 else "sft"

    def check_policy(self) -> None:
        """Refuse to train a reward model into the weights that the policy of PPO starts from.

        Raises:
            ConfigError: for method='full' with sft_coef=0. A command line is asked; Python code that keeps its reward model
                apart, as the comparison of methods does, is not.
        """
        if self.method == "full" and self.sft_coef == 0:
            raise ConfigError(
                "sft_coef=0 with method='full' would change the policy that PPO starts from; use method='lora', which gives "
                "the reward model an adapter of its own, or sft_coef above 0."
            )


@dataclass(frozen=True)
class KLSettings:
    """The penalty that keeps the actor near the reference."""

    coef: float = setting(0.02, "Weight of the per-token KL in the reward (kl_coef).")
    estimator: Literal["k1", "k3"] = setting("k1", "k1: log-ratio; k3: exp(-d) - 1 + d, never negative, lower variance.")
    adaptive: bool = setting(False, "Steer the coefficient towards the target KL.")
    target: float = setting(6.0, "KL per response, in nats, that the adaptive coefficient aims at.")
    horizon: int = setting(10000, "Responses over which the adaptive coefficient reacts.")

    def __post_init__(self) -> None:
        _not_negative(self, "coef")
        _positive(self, "target", "horizon")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation with all four roles on one base."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    rollout: RolloutSettings = setting(RolloutSettings, "How responses are sampled.")
    reward: RewardSettings = setting(RewardSettings, "What the score is made of.")
    kl: KLSettings = setting(KLSettings, "The KL penalty.")
    optimizer: OptimizerSettings = setting(lambda: OptimizerSettings(learning_rate=5e-5), "AdamW and its schedule.")
    critic_learning_rate: float | None = setting(None, "Peak learning rate of the critic; null is the actor's.")
    steps: int = setting(100, "PPO steps: rollouts, each followed by its updates.")
    ppo_epochs: int = setting(4, "Passes over each rollout.")
    minibatch_size: int = setting(16, "Responses per optimizer step.")
    microbatch_size: int = setting(4, "Most responses per forward and backward pass.")
    microbatch_tokens: int | None = setting(
        None, "Most tokens, padding included, per forward and backward pass; null sets no limit."
    )
    gamma: float = setting(1.0, "Discount per token.")
    gae_lambda: float = setting(0.95, "Decay of generalised advantage estimation.")
    whiten_advantages: bool = setting(True, "Give the advantages of a rollout mean 0 and variance 1.")
    clip_range: float = setting(0.2, "Policy ratio clip.")
    value_clip_range: float | None = setting(0.2, "Value clip around the rollout's values; null clips nothing.")
    vf_coef: float = setting(0.5, "Weight of the value loss.")
    entropy_coef: float = setting(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = setting(
        None, "Stop updating the actor in a step once its approximate KL to the rollout policy passes this (nats per token)."
    )
    critic_warmup_steps: int = setting(0, "First steps in which only the critic is updated.")
    sample_every: int = setting(10, "Record samples every this many steps.")
    eval_every: int = setting(0, "Score held-out prompts every this many steps; 0 only before and after training.")
    eval_prompts: int = setting(128, "Held-out prompts used per evaluation.")
    update_order: Literal["together", "in-turn"] = setting(
        "together",
        "Step actor and critic together, or in-turn: the actor, then the critic, so that one role's gradients exist at a time. "
        "The same bits, but for fp16 where gradients overflow.",
    )

    def __post_init__(self) -> None:
        _positive(self, "critic_learning_rate", "steps", "ppo_epochs", "minibatch_size", "microbatch_size", "microbatch_tokens")
        _positive(self, "clip_range", "value_clip_range", "vf_coef", "target_kl", "sample_every", "eval_prompts")
        _not_negative(self, "entropy_coef", "critic_warmup_steps", "eval_every")
        _fraction(self, "gamma", "gae_lambda")
        rows = self.rollout.batch_size
        if rows % self.minibatch_size:
            raise ConfigError(
                f"rollout.batch_size={rows} is not divisible by minibatch_size={self.minibatch_size}; "
                f"choose a minibatch_size that divides {rows}."
            )
