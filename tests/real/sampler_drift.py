"""How far a KV cache in int8 and merged copies of the weights are from exact sampling on SmolLM2-135M-Instruct.

    python -m tests.real.sampler_drift --model runs/real_model/base    # the folder that examples/real_model/prepare.py makes

Responses are sampled exactly; their tokens are then fed through each way to decode, so that what differs is the way.
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.real_model.instructions import TRAIN_TOPICS, instructions, messages
from hydra_ppo.algorithms.losses import logprob_drift
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.decoder import Decoder, decoding_attention
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.rollout.weight_copies import WeightCopies

TEMPERATURE = 0.7
ADAPTER = 0.01
"""Standard deviation of both halves of the actor's adapter."""


def prompts_of(folder: str, rows: int) -> tuple[list[list[int]], int]:
    """Return the token ids of instructions in the model's chat template, and its end of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = instructions(TRAIN_TOPICS, rows, seed=0)
    chats = [messages(text) for text in asked]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], tokenizer.eos_token_id


@torch.no_grad()
def forced(
    model: HydraModel, experience: Experience, kv_cache: Literal["auto", "int8"], copies: WeightCopies | None = None
) -> Tensor:
    """Return the log-probs (B, R) of given responses, decoded token by token on such a cache, with such weights."""
    ids, steps = experience.response_ids, experience.response_ids.shape[1]
    found = []
    with model.role("actor"), decoding_attention(model):
        decoder = Decoder(model, experience.prompts(), steps, kv_cache, copies)
        for step in range(steps):
            token = ids[:, step, None]
            found.append(decoder.head.logits(decoder.hidden, TEMPERATURE).float().log_softmax(dim=-1).gather(1, token))
            if step + 1 < steps:
                decoder._advance(token, step, None)
    return torch.cat(found, dim=1)


def measure(folder: str, dtype: str, rows: int = 32, tokens: int = 64) -> dict[str, tuple[float, float]]:
    """Return mean and largest |difference| of log-probs, nats per token, by what is compared with what."""
    model = HydraModel.from_pretrained(folder, dtype=dtype, device="cpu")
    torch.manual_seed(0)
    for parameter in model.role_parameters("actor").values():  # so that there is something to merge
        torch.nn.init.normal_(parameter, std=ADAPTER)
    prompts, end = prompts_of(folder, rows)
    settings = RolloutSettings(batch_size=rows, max_new_tokens=tokens, temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(0)
    responses = sample(model, prompts, settings, [end], generator).responses
    experience = Experience.from_lists(prompts, responses, 0, model.device)
    exact, rounded = (forced(model, experience, kind) for kind in ("auto", "int8"))
    merged = forced(model, experience, "auto", WeightCopies(rows))
    with torch.no_grad(), model.role("actor"):
        whole = model.logprobs(experience.sequences(), TEMPERATURE).logprobs
    pairs = {
        "int8 cache, exact cache": (rounded, exact),
        "exact cache, pass": (exact, whole),
        "int8 cache, pass": (rounded, whole),
        "merged copies, exact weights": (merged, exact),
        "merged copies, pass": (merged, whole),
    }
    print(f"{dtype}: {sum(map(len, responses))} tokens of {rows} responses")
    found = {}
    for name, (one, other) in pairs.items():
        mean, largest = logprob_drift(one, other, experience.response_mask).tolist()
        found[name] = mean, largest
        print(f"  {name}: mean {mean:.5f}, largest {largest:.4f} nats per token")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/real_model/base")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    for dtype in options.dtypes:
        measure(options.model, dtype)


if __name__ == "__main__":
    main()
