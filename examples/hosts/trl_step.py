"""TRL's step-style PPO (trl<0.12) on one shared base: python examples/hosts/trl_step.py

A tiny random model that knows numbers; a random reward head takes the place of a trained one.
"""

import warnings

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast
from trl import PPOConfig, PPOTrainer

from hydra_ppo import HydraModel, role_views
from hydra_ppo.patches.trl import apply

STEPS, ROWS, PROMPT_TOKENS = 12, 8, 8
warnings.filterwarnings("ignore")
torch.manual_seed(0)

vocabulary = {str(number): number for number in range(500)} | {"<pad>": 500, "<end>": 501}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
)
config = LlamaConfig(
    vocab_size=len(vocabulary),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
)
settings = PPOConfig(batch_size=ROWS, mini_batch_size=4, gradient_accumulation_steps=2, learning_rate=2e-3, init_kl_coef=0.02)

model = HydraModel.from_config(config)  # from_pretrained("runs/sft") of a model that joint SFT has trained
torch.nn.init.normal_(model.heads["reward"].weight, std=0.1)

trainer = PPOTrainer(settings, tokenizer=tokenizer, **apply(model))
for step in range(STEPS):
    queries = list(torch.randint(500, (ROWS, PROMPT_TOKENS)))
    responses = trainer.generate(
        queries,
        batch_size=ROWS,
        return_prompt=False,
        max_new_tokens=16,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = [{"input_ids": torch.cat(pair)} for pair in zip(queries, responses, strict=True)]
    batch = tokenizer.pad(rows, return_tensors="pt")
    scores = role_views(model).reward(**batch).logits[:, 0]
    stats = trainer.step(queries, responses, list(scores))
    print(f"step {step:2d}  KL {stats['objective/kl']:7.4f}  mean score {stats['ppo/mean_scores']:7.4f}")
