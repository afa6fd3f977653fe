"""Where the defaults come from that a paper, a recipe or a measurement of this project stands for.

A default that has no line here is a choice of size or of convenience, such as how often a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Evidence = Mapping[str, tuple[Any, str]]

PPO_PAPER = "PPO, 1707.06347"
HYDRA = "Hydra-RLHF, 2309.00754"
LORA_STUDY = "AlpacaFarm's PPO with LoRA, 2309.09055"
DEEPSPEED = "DeepSpeed-Chat, 2308.01320"

_SHARED = {
    "model.lora.r": (
        16,
        "in RL ranks from 1 on learn as full training does: LoRA Without Regret, 2025; 2510.11696",
    ),
    "model.lora.alpha": (32, "twice the rank, as in Miles' recipe for LoRA PPO on GLM-5.2"),
    "model.lora.target_modules": ("all-linear", f"LoRA Without Regret, 2025; {HYDRA}'s launch scripts adapt all linear layers"),
    "optimizer.beta2": (0.95, "InstructGPT, 2203.02155"),
    "optimizer.weight_decay": (0.0, f"launch scripts of {HYDRA}; {DEEPSPEED}"),
}
SFT: Evidence = _SHARED | {
    "optimizer.learning_rate": (
        1e-4,
        "reward models with LoRA take ten times the rate of full training: PERL, 2403.10704",
    ),
    "reward_coef": (0.1, f"the gamma of {HYDRA}"),
    "epochs": (1, "more passes over the same pairs make no better reward model: 2210.10760, footnote 7"),
    "advantage_bound": (2.5, "2309.10202"),
}
PPO: Evidence = _SHARED | {
    "optimizer.learning_rate": (5e-5, f"a launch script of {HYDRA}; 3e-5 in Miles' recipe for GLM-5.2"),
    "ppo_epochs": (4, f"a launch script of {HYDRA}"),
    "rollout.samples_per_prompt": (1, "more prompts beat more answers to each: 2412.06000; as good as groups: 2608.23566"),
    "rollout.temperature": (1.0, LORA_STUDY),
    "kl.coef": (0.02, f"the beta of {HYDRA}; {LORA_STUDY}"),
    "kl.estimator": ("k1", "InstructGPT, 2203.02155"),
    "kl.target": (6.0, "1909.08593"),
    "kl.horizon": (10000, "1909.08593"),
    "gamma": (1.0, f"{LORA_STUDY}; {DEEPSPEED}"),
    "gae_lambda": (0.95, f"{HYDRA}; {DEEPSPEED}"),
    "lambda_alpha": (0.05, "VAPO, 2504.05118"),
    "group_std": (True, "GRPO, 2402.03300"),
    "clip_range": (0.2, f"{PPO_PAPER}; {DEEPSPEED}"),
    "value_clip_range": (0.2, f"{DEEPSPEED}; {LORA_STUDY}"),
    "vf_coef": (0.5, f"half the squared error: {DEEPSPEED}"),
    "rehearsal.coef": (0.01, "2309.10202"),
}


def evidence(config_class: type) -> Evidence:
    """Return, by full name of a setting, the default that is meant and where it comes from."""
    return {"SFTConfig": SFT, "PPOConfig": PPO}.get(config_class.__name__, {})
