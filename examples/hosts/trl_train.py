"""TRL's PPOTrainer on one shared base; the three lines that differ from a script with four models are marked.

Without arguments it runs on a tiny random model, in seconds. With `--model`, the folder that `hydra-ppo sft` wrote.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from transformers import AutoTokenizer, LlamaConfig, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

import hydra_ppo.patches.trl as hydra_trl  # 1
from hydra_ppo import HydraModel


class PrintStep(TrainerCallback):
    """Prints what moves."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "objective/kl" in logs:
            print(f"episode {logs['episode']}: KL {logs['objective/kl']:.4f}, score {logs['objective/scores']:.3f}")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder that hydra-ppo sft wrote; a tiny random model without it")
    parser.add_argument("--quantization", choices=["int8", "nf4", "fp4"], help="how the base is held")
    parser.add_argument("--output", help="where the adapters are saved; nowhere without it")
    parser.add_argument("--updates", type=int, default=3)
    options = parser.parse_args()

    if options.model:
        model = HydraModel.from_pretrained(options.model, quantization=options.quantization)  # 2
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        texts = ["Tell me about rivers.", "Why is the sky blue?"] * 32
        rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
        collator = None
    else:
        model, tokenizer, rows, collator = tiny()

    args = PPOConfig(
        output_dir=options.output or tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=1,
        num_ppo_epochs=2,
        response_length=16,
        total_episodes=8 * options.updates,
        stop_token="eos",
        learning_rate=1e-3,
        num_sample_generations=0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = PPOTrainer(
        args,
        tokenizer,
        **hydra_trl.apply(model),  # 3: in the place of model, ref_model, reward_model, value_model
        train_dataset=rows,
        data_collator=collator,
        callbacks=[PrintStep()],
    )
    trainer.train()
    if options.output:
        trainer.save_model(options.output)  # loads with HydraModel.from_pretrained, and each adapter with PEFT


def tiny() -> tuple:
    """Build a random model with a random reward, the least of a tokenizer, and prompts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = HydraModel.from_config(config)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0, save_pretrained=lambda folder: None)
    rows = [{"input_ids": row} for row in torch.randint(3, 256, (64, 8)).tolist()]
    return model, tokenizer, rows, lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}


if __name__ == "__main__":
    main()
