"""Worker of `hydra` and `hydra-trunk`: this package's own trainer, which also says how long each phase took."""

from __future__ import annotations

import os
from itertools import count

import torch
from transformers import LlamaConfig
from worker import Session
from workloads import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_RANK

from hydra_ppo.config.settings import KLSettings, LoraSettings, OptimizerSettings, RolloutSettings
from hydra_ppo.profiling.benchmarks.phases import Clock
from hydra_ppo.profiling.benchmarks.trainers import make_trainer, random_model


def main() -> None:
    """Build the trainer and do updates until told to stop."""
    session = Session()
    workload = session.workload
    if session.options.get("plain"):
        torch.backends.mkldnn.enabled = False
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "")  # which `keep_freed_memory` takes for the user's own choice
    model = random_model(
        LlamaConfig(**workload.llama()),
        LoraSettings(r=LORA_RANK, alpha=LORA_ALPHA),
        session.dtype,
        session.options["trunk_layers"],
    )
    clock = Clock()
    trainer = make_trainer(
        model,
        workload.prompts(workload.rows * session.updates),
        RolloutSettings(
            batch_size=workload.rows,
            max_new_tokens=workload.response_tokens,
            weights=session.options.get("weights", "shared"),
        ),
        on_phase=lambda phase: clock(phase),
        kl=KLSettings(coef=KL_COEF),
        optimizer=OptimizerSettings(learning_rate=LEARNING_RATE),
        steps=session.updates,
        ppo_epochs=workload.epochs,
        minibatch_size=workload.rows,
        microbatch_size=workload.microbatch,
    )
    for step in count(1):
        session.begin()
        clock = Clock()
        metrics = trainer.step(step)
        clock("end")
        session.end(phases=clock.seconds)
        session.check_lengths([metrics["rollout/response_length"]])  # the mean, of which none may fall short


if __name__ == "__main__":
    main()
