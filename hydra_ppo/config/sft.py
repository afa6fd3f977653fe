"""Every setting of joint SFT and reward modelling."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from hydra_ppo.config.data import DataSettings
from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.fields import setting
from hydra_ppo.config.model import ModelSettings
from hydra_ppo.config.running import OptimizerSettings, RunSettings
from hydra_ppo.errors import ConfigError

FloorKind = Literal["other-prompt", "truncated", "shuffled", "repeated", "random-tokens"]


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
    reward_heads: int = setting(1, "Reward heads on the one base; several make an ensemble that costs no further pass.")
    head_share: float = setting(
        0.8, "With several reward heads: the share of the pairs that each learns from, a draw of its own."
    )
    reward_loss: Literal["bradley-terry", "divergent", "margin", "advantage"] = setting(
        "bradley-terry",
        "Ranking loss at the last token; at every token since the answers part; with the margin of each pair; or with scores "
        "above a learned expected reward, held within +-advantage_bound.",
    )
    advantage_bound: float = setting(2.5, "Of reward_loss 'advantage': the m beyond which advantages are pushed back.")
    floor_share: float = setting(0.0, "Share of each batch's pairs that set a chosen answer against a corrupted one.")
    floor_steps: int = setting(0, "First steps, in which the reward heads alone learn from such pairs alone.")
    floor_kinds: list[FloorKind] = setting(
        lambda: ["other-prompt", "truncated", "shuffled", "repeated"],
        "What corrupted answers are: one to another prompt, cut off, in pieces out of order, or a piece again and again; "
        "random-tokens is the control.",
    )

    def __post_init__(self) -> None:
        _not_negative(self, "sft_coef", "reward_coef")
        _positive(self, "epochs", "max_steps", "batch_size", "microbatch_size", "eval_every", "eval_pairs")
        self._check_reward()
        self._check_floor()
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
        for name in ("actor_rank", "critic_rank"):
            if (rank := getattr(self.model.lora, name)) is not None:
                raise ConfigError(f"model.lora.{name}={rank} is of ppo, and sft trains neither; set model.lora.r.")
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

    def _check_reward(self) -> None:
        """Refuse settings of the reward model that contradict each other, or that nothing would read."""
        _positive(self, "reward_heads", "head_share", "advantage_bound")
        _check(self, "head_share", self.head_share <= 1, "must be at most 1", "choose for example 0.8")
        unread = {
            "reward_heads": self.reward_coef == 0,
            "reward_loss": self.reward_coef == 0,
            "floor_share": self.reward_coef == 0,
            "floor_steps": self.reward_coef == 0,
        }
        for name, idle in unread.items():
            rule = "has nothing to do with reward_coef=0, which trains no reward model"
            self._check_read(name, idle, rule, f"set reward_coef above 0, or leave {name} out")
        rule = "has nothing to do with one reward head"
        self._check_read("head_share", self.reward_heads == 1, rule, "set reward_heads above 1, or leave head_share out")
        rule, remedy = f"has nothing to do with reward_loss={self.reward_loss!r}", "leave advantage_bound out"
        self._check_read("advantage_bound", self.reward_loss != "advantage", rule, remedy)

    def _check_floor(self) -> None:
        """Refuse settings of floor pairs that leave no batch of either kind, or that nothing would read."""
        _not_negative(self, "floor_share", "floor_steps")
        _check(self, "floor_share", self.floor_share < 1, "must be below 1", "choose for example 0.1")
        fits = self.floor_share == 0 or 0 < self.floor_pairs < self.batch_size
        rule = f"gives {self.floor_pairs} floor pairs in a batch_size of {self.batch_size}"
        _check(self, "floor_share", fits, rule, "choose a share that leaves at least one pair of each kind")
        _check(self, "floor_kinds", bool(self.floor_kinds), "names no kind", "name at least one")
        twice = len(set(self.floor_kinds)) < len(self.floor_kinds)
        _check(self, "floor_kinds", not twice, "names a kind twice", "name each once")
        off = not self.has_floor
        self._check_read("floor_kinds", off, "has nothing to do without floor pairs", "set floor_share or floor_steps above 0")
        ends = self.max_steps is not None and self.floor_steps >= self.max_steps
        rule = f"leaves no step of max_steps={self.max_steps} to train on preferences"
        _check(self, "floor_steps", not ends, rule, "raise max_steps, or lower floor_steps")

    def _check_read(self, name: str, idle: bool, rule: str, remedy: str) -> None:
        """Refuse a setting that is not at its default where nothing reads it."""
        made = {f.name: f for f in fields(self)}[name]
        default = made.default if made.default_factory is MISSING else made.default_factory()
        _check(self, name, not idle or getattr(self, name) == default, rule, remedy)

    @property
    def has_floor(self) -> bool:
        """Whether there are floor pairs."""
        return self.floor_share > 0 or self.floor_steps > 0

    @property
    def floor_pairs(self) -> int:
        """Floor pairs of a batch, beside those of the data."""
        return round(self.floor_share * self.batch_size)

    @property
    def data_pairs(self) -> int:
        """Pairs of a batch that are of the data."""
        return self.batch_size - self.floor_pairs

    def floor_beside(self, pairs: int) -> int:
        """Return the floor pairs beside so many of the data, which are fewer than `data_pairs` at the end of an epoch."""
        return round(self.floor_pairs * pairs / self.data_pairs)

    def steps(self, pairs: int) -> int:
        """Return the optimizer steps of a run over so many training pairs."""
        whole = self.floor_steps + math.ceil(pairs / self.data_pairs) * self.epochs
        return min(whole, self.max_steps or whole)

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
