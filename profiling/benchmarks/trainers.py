"""What every benchmark of whole PPO steps runs: a random model, random prompts, a trainer whose responses never end early."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from hydra_ppo.config.settings import LoraSettings, PPOConfig, RolloutSettings
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.profiling.subjects.stand_ins import NoTokenizer, unused_settings
from hydra_ppo.training.ppo import PPOTrainer


def endless_llama(**sizes: Any) -> LlamaConfig:
    """Return the config of a Llama of these sizes, without tokens that begin, end or pad a row: no response ends early."""
    return LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def random_model(
    config: PretrainedConfig, lora: LoraSettings | None = None, dtype: str = "fp32", trunk_layers: int = 0
) -> HydraModel:
    """Return a model on the CPU with random weights, the same ones each time; a new head's zeros are replaced too.

    Args:
        config: such as `endless_llama` gives.
        lora, dtype, trunk_layers: as of `HydraModel.from_config`.
    """
    torch.manual_seed(0)
    model = HydraModel.from_config(config, dtype=dtype, device="cpu", lora=lora, trunk_layers=trunk_layers)
    for head in model.heads.values():
        nn.init.normal_(head.weight, std=0.02)
    model.reward_head_trained = True  # its scores need no meaning here, and the trainer asks
    return model


def random_prompts(vocabulary: int, tokens: int, count: int) -> list[list[int]]:
    """Return the ids of `count` prompts of `tokens` each, the same ones each time."""
    source = random.Random(0)
    return [[source.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


def make_trainer(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    rollout: RolloutSettings,
    *,
    memory: Literal["always", "never"] = "never",
    on_phase: Callable[[str], None] = lambda phase: None,
    world: World = ALONE,
    **settings: Any,
) -> PPOTrainer:
    """Return a trainer on the head's rewards.

    Args:
        model: of `random_model`. Its end token is the first beyond the vocabulary, which cannot be sampled.
        prompts: ids.
        rollout: batch sizes and the length of every response.
        memory: whether it keeps peaks by phase.
        on_phase, world: as of the trainer.
        settings: further fields of PPOConfig.
    """
    return PPOTrainer(
        *(model, NoTokenizer(model.causal_lm.config.vocab_size)),
        PPOConfig(**unused_settings(memory), rollout=rollout, **settings),
        [PromptRow("", tuple(ids)) for ids in prompts],
        on_phase=on_phase,
        world=world,
    )
