"""A hand-written PPO loop on one shared base: only the line that builds four models has changed.

The loop knows nothing of this package. It calls four Hugging Face models, takes log-softmax of whole logits, sums two
losses and calls one backward, as such loops do; the role views keep all of that from costing four models and B x T x V.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from hydra_ppo import HydraModel, role_views

PAD, EOS = 0, 2
STEPS, BATCH, PROMPT, RESPONSE = 4, 16, 8, 16
KL_COEF, CLIP, GAMMA, LAMBDA = 0.05, 0.2, 1.0, 0.95


def main(steps: int = STEPS) -> list[float]:
    """Train and return the value loss of each step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    model = HydraModel.from_config(config)  # or HydraModel.from_pretrained("runs/sft", quantization="nf4")
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.3)
    actor, reference, critic, reward = role_views(model).values()  # before: four calls of from_pretrained
    return train(actor, reference, critic, reward, steps)


def train(actor, reference, critic, reward, steps: int) -> list[float]:
    """Run PPO on four models."""
    optimizer = torch.optim.AdamW([*actor.parameters(), *critic.parameters()], lr=3e-3)
    prompts = torch.randint(3, 512, (BATCH, PROMPT))
    losses = []
    for step in range(steps):
        sequences = actor.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=RESPONSE, pad_token_id=PAD
        )
        mask = torch.ones_like(sequences)
        mask[:, PROMPT:] = (sequences[:, PROMPT:] != PAD).long()
        with torch.no_grad():
            old_logprobs = logprobs(actor, sequences, mask)
            ref_logprobs = logprobs(reference, sequences, mask)
            scores = reward(sequences, attention_mask=mask).logits[:, 0]
            old_values = values(critic, sequences, mask)
            counts = mask[:, PROMPT:].bool()
            rewards = -KL_COEF * (old_logprobs - ref_logprobs) * counts
            rewards[torch.arange(len(rewards)), counts.sum(1) - 1] += scores
            advantages = gae(rewards, old_values * counts)
            returns = advantages + old_values
            advantages = (advantages - advantages[counts].mean()) / (advantages[counts].std() + 1e-8)
        for _ in range(2):
            ratio = (logprobs(actor, sequences, mask) - old_logprobs).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            policy_loss = -surrogate[counts].mean()
            value_loss = (values(critic, sequences, mask) - returns).square()[counts].mean()
            (policy_loss + 0.5 * value_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(value_loss.item())
        print(f"step {step}: score {scores.mean():.3f}, policy loss {policy_loss:.4f}, value loss {value_loss:.4f}")
    return losses


def logprobs(model, sequences, mask):
    """Log-probs of the responses, (B, R)."""
    logits = model(input_ids=sequences, attention_mask=mask).logits[:, PROMPT - 1 : -1]
    return F.log_softmax(logits, dim=-1).gather(-1, sequences[:, PROMPT:, None]).squeeze(-1)


def values(model, sequences, mask):
    """Values of the states before each response token, (B, R)."""
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(input_ids=sequences, attention_mask=mask).last_hidden_state
    return model.score(hidden)[:, PROMPT - 1 : -1, 0]


def gae(rewards, values):
    """Generalised advantage estimation, (B, R)."""
    advantages, last = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * last
        advantages[:, t] = last
    return advantages


if __name__ == "__main__":
    main()
