"""Worker of `hydra` and `hydra-trunk`: this package's own trainer, which also says how long each phase took."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig
from worker import Session
from workloads import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_RANK

from hydra_ppo.config.settings import (
    DataSettings,
    KLSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    PPOConfig,
    RolloutSettings,
    RunSettings,
)
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.training.ppo import PPOTrainer


def main() -> None:
    """Build the trainer and do updates until told to stop."""
    session = Session()
    workload = session.workload
    if session.options.get("plain"):
        torch.backends.mkldnn.enabled = False
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "")  # which `keep_freed_memory` takes for the user's own choice
    model = HydraModel.from_config(
        LlamaConfig(**workload.llama()),
        dtype=session.dtype,
        device="cpu",
        lora=LoraSettings(r=LORA_RANK, alpha=LORA_ALPHA),
        trunk_layers=session.options["trunk_layers"],
    )
    for head in model.heads.values():
        nn.init.normal_(head.weight, std=0.02)
    model.reward_head_trained = True
    config = PPOConfig(
        model=ModelSettings(name_or_path="unused"),
        data=DataSettings(train="unused"),
        run=RunSettings(output="unused", memory="never"),
        rollout=RolloutSettings(batch_size=workload.rows, max_new_tokens=workload.response_tokens),
        kl=KLSettings(coef=KL_COEF),
        optimizer=OptimizerSettings(learning_rate=LEARNING_RATE),
        steps=session.updates,
        ppo_epochs=workload.epochs,
        minibatch_size=workload.rows,
        microbatch_size=workload.microbatch,
    )
    prompts = [PromptRow("", tuple(ids)) for ids in workload.prompts(workload.rows * session.updates)]
    marks: list[tuple[str, float]] = []  # phase, and when it began
    trainer = PPOTrainer(
        *(model, _tokenizer(workload.end_token), config, prompts),
        on_phase=lambda phase: marks.append((phase, time.perf_counter())),
    )
    for step in count(1):
        session.begin()
        marks.clear()
        metrics = trainer.step(step)
        session.end(phases=phase_seconds(marks, time.perf_counter()))
        session.check_lengths([metrics["rollout/response_length"]])  # the mean, of which none may fall short


def phase_seconds(marks: Sequence[tuple[str, float]], end: float) -> dict[str, float]:
    """Return the seconds of rollout, score and update (actor, critic and optimizer together).

    Args:
        marks: phases in the order in which they began, and when.
        end: of the last one.
    """
    found = {"rollout": 0.0, "score": 0.0, "update": 0.0}
    ends = [begun for _, begun in marks[1:]] + [end]
    for (phase, begun), over in zip(marks, ends, strict=True):
        found[phase if phase in found else "update"] += over - begun
    return found


def _tokenizer(end_token: int) -> SimpleNamespace:
    """Stand in for a tokenizer: texts are needed for reward functions only, and the reward here is the head's."""
    return SimpleNamespace(
        eos_token_id=end_token, pad_token_id=0, batch_decode=lambda rows, skip_special_tokens: [""] * len(rows)
    )


if __name__ == "__main__":
    main()
