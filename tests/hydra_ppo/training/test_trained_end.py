"""A policy gains nothing by ending its answers in a token that the reward head was not trained at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from hydra_ppo.config.settings import KLSettings, OptimizerSettings, RewardSettings, RolloutSettings
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout import collect
from hydra_ppo.training.joint_sft import JointSFTTrainer
from hydra_ppo.training.ppo import PPOTrainer
from tests.training import hydra, llama, pairs, ppo_config, prompts, sft_config, tokenizer

EOS, END = 2, 31  # the tokenizer's end, and the end of a turn: its last word


def chat_tokenizer():
    """Turns end in w27, texts in <eos>, as with Gemma 3."""
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["w27"]})
    found.chat_template = "{% for m in messages %}{{ m.content }} w27 {% endfor %}"
    return found


def random_base() -> LlamaForCausalLM:
    """The same one each time, with a head that leaves the adapters a say."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama())
    with torch.no_grad():
        base.lm_head.weight.mul_(10)
    return base


def half_and_half() -> list[PreferenceRow]:
    """Pairs of which every second ends in the other end token, so that the policy knows both."""
    rows = []
    for number, row in enumerate(pairs(192)):
        end = END if number % 2 else EOS
        rows.append(replace(row, chosen_ids=(*row.chosen_ids[:-1], end), rejected_ids=(*row.rejected_ids[:-1], end)))
    return rows


def trained() -> tuple:
    """A model whose reward head likes what ends in <eos> better, by much: what PPO must not find."""
    model = HydraModel(random_base(), train="sft")
    config = sft_config(epochs=6, batch_size=16, microbatch_size=16, optimizer=OptimizerSettings(learning_rate=1e-2))
    JointSFTTrainer(model, config, half_and_half(), pad_token_id=0).train()
    # A head that says +3 of what ends in <eos> and -3 of what ends in w27, whatever stands before: least squares.
    rows = half_and_half()
    contexts = [(row.prompt_ids, answer[:-1]) for row in rows for answer in (row.chosen_ids, row.rejected_ids)]
    states = []
    with torch.no_grad(), model.role("reward"):
        for end in (EOS, END):
            answers = [[*answer, end] for _, answer in contexts]
            batch = Experience.from_lists([prompt for prompt, _ in contexts], answers, 0, model.device).sequences()
            states.append(model._states(batch).at(batch.last_positions()[:, None])[:, 0].float())
        wanted = torch.cat([torch.full((len(contexts), 1), 3.0), torch.full((len(contexts), 1), -3.0)])
        model.heads["reward"].weight.copy_(torch.linalg.lstsq(torch.cat(states), wanted).solution.T)
    return model


def share_of_eos(trainer: PPOTrainer, seed: int) -> float:
    """The share of <eos> among the ends of 256 sampled responses."""
    generator = torch.Generator().manual_seed(seed)
    rows = [row.ids for row in trainer.prompts] * 16
    batch = collect.sample(trainer.model, rows, trainer.config.rollout, trainer.eos_ids, generator)
    ends = [response[-1] for response in batch.responses if response[-1] in trainer.eos_ids]
    assert len(ends) > 100
    return sum(end == EOS for end in ends) / len(ends)


@pytest.mark.parametrize("alike", [True, False])
def test_ppo_keeps_the_end_that_answers_have(alike, tmp_path, monkeypatch):
    """With scores read wherever an answer happened to end, the same PPO moves all of them to the other token."""
    model = trained()
    model.save_pretrained(tmp_path)
    model = HydraModel(random_base(), saved=tmp_path)
    model.reward_head_trained = True
    if not alike:
        monkeypatch.setattr(collect, "ending_alike", lambda sequences, eos_ids: sequences)
    config = ppo_config(
        steps=12,
        rollout=RolloutSettings(batch_size=64, max_new_tokens=8, score_batch_size=64),
        minibatch_size=64,
        microbatch_size=64,
        kl=KLSettings(coef=2.0),  # holds the share against chance, not against a score that is 6 apart
        reward=RewardSettings(missing_eos_penalty=20.0),  # an answer that does not end is not the better one here
        optimizer=OptimizerSettings(learning_rate=1e-3),
    )
    trainer = PPOTrainer(model, chat_tokenizer(), config, prompts())
    assert trainer.eos_ids == [END, EOS]
    before = share_of_eos(trainer, 1)
    assert 0.2 < before < 0.8
    trainer.train()
    after = share_of_eos(trainer, 2)
    if alike:
        assert after < before + 0.25
    else:
        assert after > 0.8


def test_a_head_is_not_read_where_it_was_not_trained(tmp_path):
    model = hydra()
    model.reward_head_trained, model.trained_end = True, EOS
    with pytest.raises(ConfigError, match=r"data.end_of_turn: answers end at w27 \(31\) here, .* trained at <eos> \(2\)"):
        PPOTrainer(model, chat_tokenizer(), ppo_config(), prompts())
    named = replace(ppo_config(), data=replace(ppo_config().data, end_of_turn="<eos>"))
    trainer = PPOTrainer(model, chat_tokenizer(), named, prompts())
    assert trainer.eos_ids == [EOS, END]
    model.save_pretrained(tmp_path)
    again = HydraModel(random_base(), saved=tmp_path)
    assert again.trained_end == EOS
    assert again.causal_lm.generation_config.eos_token_id == [EOS, END]
