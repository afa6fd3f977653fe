"""The quickstart's task, as small as it goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hydra_ppo.quickstart import corpus as reviews
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.quickstart.corpus import make_corpus


@pytest.fixture
def small(monkeypatch):
    """Two optimizer steps of SFT, one PPO step, few rows."""
    sft, ppo = quickstart.sft_config, quickstart.ppo_config

    def corpus(seed, pairs=48, eval_pairs=8, label_noise=0.1):
        return make_corpus(seed, min(pairs, 48), min(eval_pairs, 8), 16, 6, label_noise)

    def small_ppo(folder, seed):
        config = ppo(folder, seed)
        rollout = replace(config.rollout, batch_size=4, max_new_tokens=6)
        return replace(config, steps=1, ppo_epochs=1, minibatch_size=4, microbatch_size=4, rollout=rollout, eval_prompts=6)

    monkeypatch.setattr(quickstart, "make_corpus", corpus)
    monkeypatch.setattr(reviews, "make_corpus", corpus)
    monkeypatch.setattr(quickstart, "sft_config", lambda folder, seed: replace(sft(folder, seed), max_steps=2, eval_every=2))
    monkeypatch.setattr(quickstart, "ppo_config", small_ppo)
