"""Every setting of joint SFT and reward modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_ppo.config.data import DataSettings
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.fields import setting
from hydra_ppo.config.model import ModelSettings
from hydra_ppo.config.running import OptimizerSettings, RunSettings
from hydra_ppo.errors import ConfigError


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
