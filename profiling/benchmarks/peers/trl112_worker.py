"""Worker of `trl112-full`, `trl112-lora`, both tuned, and `trl112-patched`: the PPO trainer of TRL 1.12.

LoRA is on policy and value model, the reference is the policy with its adapter off; without LoRA it is a copy. Patched, the
four models are role views of one HydraModel with LoRA of the same shape, and nothing else differs. TRL clears
what it still holds of an update after the callback that ends it: that time counts towards the next update, so that in the
steady state each update has it once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from worker import Session
from workloads import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_RANK


class TakeTurns(TrainerCallback):
    """Holds `train()` before each update until the driver asks for it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first command."""
        self.session.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer, and wait for the next command."""
        self.session.end()
        self.session.begin()


def main() -> None:
    """Build the trainer and do updates until told to stop."""
    session = Session()
    workload = session.workload
    if session.options.get("tuned"):
        tune(session.workload.vocabulary)
    models = views(session) if session.options["patched"] else separate(session)
    check_rollouts(session)
    # On the last batch of its dataloader TRL takes an optimizer step per micro-batch: one batch more than is used.
    rows = [{"input_ids": ids} for ids in workload.prompts(workload.rows * (session.updates + 1))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=workload.microbatch,
                gradient_accumulation_steps=workload.rows // workload.microbatch,
                num_mini_batches=1,
                num_ppo_epochs=workload.epochs,
                local_rollout_forward_batch_size=workload.rows,
                response_length=workload.response_tokens,
                total_episodes=len(rows),
                temperature=1.0,
                kl_coef=KL_COEF,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,  # means autocast; with dtype=bf16 it is the weights that are bf16
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            # A real tokenizer would bring nothing: TRL asks for these two tokens, and the prompts need no padding.
            processing_class=SimpleNamespace(eos_token_id=workload.end_token, pad_token_id=workload.end_token),
            **models,
            train_dataset=rows,
            data_collator=lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])},
            callbacks=[TakeTurns(session)],
        )
        trainer.train()


def tune(vocabulary: int) -> None:
    """Give the trainer what hydra takes of torch and the C library: oneDNN for large products in fp32, freed memory kept."""
    from hydra_ppo.compute.products import SMALL, has_own_kernel, linear, times
    from hydra_ppo.runtime.host_memory import keep_freed_memory

    plain = torch.nn.functional.linear

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            ctx.save_for_backward(x, weight)
            return linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            x, weight = ctx.saved_tensors
            needs_x, needs_weight, needs_bias = ctx.needs_input_grad
            flat = gradient.flatten(0, -2)
            return (
                times(gradient, weight) if needs_x else None,
                times(flat.T, x.flatten(0, -2)) if needs_weight else None,
                flat.sum(dim=0) if needs_bias else None,
            )

    def chosen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        large = x.numel() * weight.shape[0] >= SMALL  # and so are both products of the backward pass
        if not (large and has_own_kernel(x)):
            return plain(x, weight, bias)
        y: Tensor = Linear.apply(x, weight, bias)
        return y if weight.shape[0] < vocabulary else y.clone()  # TRL divides a view of the logits in place

    torch.nn.functional.linear = chosen
    keep_freed_memory(torch.device("cpu"))


def views(session: Session) -> Mapping[str, Any]:
    """Build one model, patch TRL and return the trainer's arguments."""
    from hydra_ppo.config.settings import LoraSettings
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.patches import trl

    config = LlamaConfig(**session.workload.llama())
    shape = LoraSettings(r=LORA_RANK, alpha=LORA_ALPHA)
    model = HydraModel.from_config(config, dtype=session.dtype, device="cpu", lora=shape)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.02)
    return trl.apply(model)


def separate(session: Session) -> Mapping[str, Any]:
    """Build a policy, a value and a reward model, and return the trainer's arguments."""
    config = LlamaConfig(**session.workload.llama())
    policy: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=session.torch_dtype)
    value_model, reward_model = classifier(session), classifier(session)
    if session.options["lora"]:
        policy = get_peft_model(policy, lora(TaskType.CAUSAL_LM))
        value_model = get_peft_model(value_model, lora(TaskType.SEQ_CLS))
    return {"model": policy, "ref_model": None, "reward_model": reward_model, "value_model": value_model}


def lora(task: TaskType) -> LoraConfig:
    """Return LoRA on all linear layers."""
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type=task)


def classifier(session: Session) -> PreTrainedModel:
    """Build a value or reward model."""
    config = LlamaConfig(**session.workload.llama(), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=session.torch_dtype)
    # TRL calls the LoRA value model through its classification forward, which looks for padding in a batch.
    model.config.pad_token_id = session.workload.end_token
    return model


def check_rollouts(session: Session) -> None:
    """Make TRL's sampler check the length of what it returns."""
    sample = ppo_trainer.batch_generation

    def checked(*arguments: Any) -> tuple[Tensor, Tensor]:
        sequences, logits = sample(*arguments)
        lengths = (sequences != session.workload.end_token).sum(dim=1) - session.workload.prompt_tokens
        session.check_lengths(lengths.tolist())
        return sequences, logits

    ppo_trainer.batch_generation = checked


if __name__ == "__main__":
    main()
