"""The learning comparison trains, judges and goes on where it stopped; its quality is measured, not tested."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from hydra_ppo.profiling.learning import Outcome, compare_learning, learning_table, spread
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.quickstart.corpus import make_corpus


@pytest.fixture
def small(monkeypatch):
    """Two optimizer steps of SFT, one PPO step, few rows."""
    sft, ppo = quickstart.sft_config, quickstart.ppo_config

    def corpus(seed):
        whole = make_corpus(seed)
        return replace(
            whole,
            preferences=whole.preferences[:48],
            eval_preferences=whole.eval_preferences[:8],
            prompts=whole.prompts[:16],
            eval_prompts=whole.eval_prompts[:6],
        )

    def small_ppo(folder, seed):
        config = ppo(folder, seed)
        rollout = replace(config.rollout, batch_size=4, max_new_tokens=6)
        return replace(config, steps=1, ppo_epochs=1, minibatch_size=4, microbatch_size=4, rollout=rollout, eval_prompts=6)

    monkeypatch.setattr(quickstart, "make_corpus", corpus)
    monkeypatch.setattr(quickstart, "sft_config", lambda folder, seed: replace(sft(folder, seed), max_steps=2, eval_every=2))
    monkeypatch.setattr(quickstart, "ppo_config", small_ppo)


def test_every_method_is_trained_once_and_judged_against_one_opponent(small, tmp_path):
    said = []
    outcomes = compare_learning(tmp_path, ("full", "lora", "hydra"), (0,), say=said.append)
    assert [outcome.method for outcome in outcomes] == ["full", "lora", "hydra"]
    assert len(said) == 3
    for outcome in outcomes:
        assert 0 <= outcome.win_rate <= 1
        assert 0 <= outcome.reward_accuracy <= 1
    assert {p.name for p in (tmp_path / "seed-0").iterdir()} == {
        *("data", "base", "sft", "sft-alone", "reward-alone", "opponent.json", "full.json", "lora.json", "hydra.json"),
    }
    assert compare_learning(tmp_path, ("full", "lora", "hydra"), (0,), say=said.append) == outcomes
    assert len(said) == 3  # nothing was run again


def test_means_and_standard_errors_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 0.577"  # sqrt(((1 + 0 + 1) / 2) / 3)
    assert spread([0.5]) == "0.500"
    rows = [Outcome("hydra", seed, 1.0, 2.0 + seed, 0.1, 0.5, 3.0, 0.9, 1.0) for seed in (0, 1)]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(learning_table(rows))
    text = console.export_text()
    assert "2.500 ± 0.500" in text
    assert "hydra" in text
