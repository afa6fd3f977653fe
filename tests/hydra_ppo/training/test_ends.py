"""The reward head is read where it was trained: at one token, so with the same margins and accuracy, for each template."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.data.rows import PreferenceRow, load_preferences
from hydra_ppo.experience import Experience
from hydra_ppo.model.answers import end_tokens, settle_ends
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import score
from hydra_ppo.training.joint_sft import JointSFTTrainer
from tests.hydra_ppo.test_data import PAD, assistant, data, make_tokenizer, pair, user
from tests.real.templates import FAMILIES
from tests.training import llama, sft_config

CLOSE = 1e-5  # of scores of the same tokens, in batches of other rows
GOOD, BAD = ("warm", "kind", "fresh", "calm", "fair"), ("grim", "sour", "vain", "bleak", "rude")
NAMES = ("gemma3", "phi3", "chatml", "llama2", "llama3", "mistral", "qwen2.5", "zephyr")


def rows_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[PreferenceRow]:
    """Pairs of chats whose better answer has the better words."""
    rng = random.Random(0)

    def said(words: tuple[str, ...]) -> list[dict[str, str]]:
        return [assistant(" ".join(rng.choices(words, k=rng.randint(2, 4))))]

    pairs = [pair([user(f"How is {rng.choice('abcdef')}?")], said(GOOD), said(BAD)) for _ in range(count)]
    return load_preferences(pairs, tokenizer, data()).rows


def check_places(tokenizer: PreTrainedTokenizerBase, folder: Path, pad: int, train: int = 64, epochs: int = 3) -> None:
    """Train a reward head on pairs, and compare its scores there with those that PPO gets for the same answers."""
    rows = rows_of(tokenizer, train + 32)
    held_out = rows[train:]
    torch.manual_seed(0)
    shape = llama(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "base")
    model = HydraModel.from_pretrained(folder / "base", train="sft")
    ends = end_tokens(model, tokenizer)
    settle_ends(model, tokenizer, ends, reads_head=False)
    config = sft_config(epochs=epochs, batch_size=16, microbatch_size=16, reward_coef=1.0)
    JointSFTTrainer(model, config, rows[:train], pad_token_id=pad).train()
    prompts = [row.prompt_ids for row in held_out] * 2
    answers = [row.chosen_ids for row in held_out] + [row.rejected_ids for row in held_out]
    with torch.no_grad(), model.role("reward"):
        trained = model.scores(Experience.from_lists(prompts, answers, pad, model.device).sequences())
    model.save_pretrained(folder / "run")

    ppo = HydraModel.from_pretrained(folder / "run", train="ppo")
    assert end_tokens(ppo, tokenizer) == ends
    settle_ends(ppo, tokenizer, ends, reads_head=True)

    def read(end: int, eos_ids: list[int]) -> torch.Tensor:
        responses = [[*ids[:-1], end] for ids in answers]
        experience = Experience.from_lists(prompts, responses, pad, ppo.device)
        sampled = torch.zeros(experience.response_mask.shape)
        return score(ppo, experience, sampled, RolloutSettings(score_batch_size=7), eos_ids).scores

    for end in ends:  # a rollout ends in the turn's end, or in the tokenizer's eos
        scores = read(end, ends)
        assert torch.allclose(scores, trained, atol=CLOSE)
        margins, expected = (s[:32] - s[32:] for s in (scores, trained))
        assert (margins > 0).float().mean() == (expected > 0).float().mean() >= 0.9
    for other in ends[1:]:  # where it would be read otherwise, it says something else
        assert not torch.allclose(read(other, []), trained, atol=100 * CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_read_where_they_were_trained(name, tmp_path):
    """A token per byte, with the template and the turn tokens of a family."""
    family = FAMILIES[name]
    tokenizer = make_tokenizer("<bos> {}", family.template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.turns)})
    check_places(tokenizer, tmp_path, PAD)
