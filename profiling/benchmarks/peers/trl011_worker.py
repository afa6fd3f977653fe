"""Worker of `trl011-multi`: the step-style PPO trainer of TRL 0.11 with a reward adapter on the policy's base.

One base: the reference is the policy with its adapter off, the reward model is a second adapter with a head of its own, the
critic is a head on the policy's trunk.
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from worker import Session
from workloads import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_RANK


def main() -> None:
    """Build the trainer and do updates until told to stop."""
    session = Session()
    workload = session.workload
    with tempfile.TemporaryDirectory() as folder:
        save_reward_adapter(session, folder)
        base = AutoModelForCausalLM.from_config(LlamaConfig(**workload.llama()), torch_dtype=session.torch_dtype)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            base, peft_config=lora(TaskType.CAUSAL_LM), reward_adapter=folder
        )
    trainer = PPOTrainer(
        PPOConfig(
            batch_size=workload.rows,
            mini_batch_size=workload.microbatch,
            gradient_accumulation_steps=workload.rows // workload.microbatch,
            ppo_epochs=workload.epochs,
            learning_rate=LEARNING_RATE,
            init_kl_coef=KL_COEF,
            adap_kl_ctrl=False,
        ),
        model,
        tokenizer=tokenizer(workload.end_token),
    )
    prompts = [torch.tensor(ids) for ids in workload.prompts(workload.rows * session.updates)]
    for start in range(0, len(prompts) + 1, workload.rows):  # one round more: it waits for `quit`
        session.begin()
        update(session, trainer, prompts[start : start + workload.rows])
        session.end()


def update(session: Session, trainer: PPOTrainer, prompts: list[Tensor]) -> None:
    """Do one rollout with scores, and its PPO epochs."""
    workload = session.workload
    responses = trainer.generate(
        prompts,
        batch_size=workload.rows,
        return_prompt=False,
        max_new_tokens=workload.response_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    session.check_lengths(len(response) for response in responses)
    sequences = torch.stack([torch.cat(pair) for pair in zip(prompts, responses, strict=True)])
    scores = trainer.model.compute_reward_score(sequences, attention_mask=torch.ones_like(sequences))
    trainer.step(prompts, responses, list(scores[:, -1, 0].float()))


def lora(task: TaskType) -> LoraConfig:
    """Return LoRA on all linear layers."""
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type=task)


def save_reward_adapter(session: Session, folder: str) -> None:
    """Write a reward adapter and its head, as reward training would have left them."""
    config = LlamaConfig(**session.workload.llama(), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, torch_dtype=session.torch_dtype)
    get_peft_model(model, lora(TaskType.SEQ_CLS)).save_pretrained(folder)


def tokenizer(end_token: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbers and an end token; TRL pads with that one, and looks for it in responses."""
    vocabulary = {str(token): token for token in range(end_token)} | {"<end>": end_token}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>", eos_token="<end>")


if __name__ == "__main__":
    main()
