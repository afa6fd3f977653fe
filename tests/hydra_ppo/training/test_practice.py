"""Answers practised beside PPO: what they add to the gradients, that they are not forgotten, and the same bits after a stop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import KLSettings, OptimizerSettings, PPOConfig, PtxSettings, RehearsalSettings, RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.rollout.scoring import reward_scores, scores_and_means
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.training.ppo import PPOTrainer
from hydra_ppo.training.practice import Practice, Practising, select_rehearsed
from tests.families import randomise
from tests.hydra_ppo.training.test_joint_sft import Memo
from tests.hydra_ppo.training.test_ppo import LOW_WORDS
from tests.hydra_ppo.training.test_update_order import assert_same, carried, metrics, stopping_after, trained
from tests.training import hydra, pairs, ppo_config, prompts, tokenizer

PTX = PtxSettings(data="rows", coef=0.5, minibatch_size=3)
REHEARSAL = RehearsalSettings(data="rows", coef=0.5, clusters=3, share=0.25)
ROWS = pairs(24)


def config(**changes) -> PPOConfig:
    return ppo_config(**{"reward": LOW_WORDS, "optimizer": OptimizerSettings(learning_rate=2e-3), **changes})


def model():
    built = hydra()
    with torch.no_grad():
        built.heads["reward"].weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(3)))
    built.reward_head_trained = True
    return built


def trainer(built, settings, **options) -> PPOTrainer:
    rows = {name: ROWS for name in ("ptx", "rehearsal") if getattr(settings, name).data is not None}
    return PPOTrainer(built, tokenizer(), settings, prompts(), prompts(20)[16:], **{"run": Memo(), **rows, **options})


def _nll(built, batch: Experience) -> torch.Tensor:
    with built.role("actor"):
        logprobs = built.logprobs(batch.sequences()).logprobs
    return -logprobs[batch.response_mask].mean()


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("size", [(1, None), (8, None), (8, 12)])
def test_what_is_added_to_the_gradients(relative, size):
    """By hand: PPO's gradient and a part of that of the cross-entropy, whatever the micro-batches."""
    built = model()
    randomise(built)
    ppo = trainer(built, config())
    actor = list(built.role_parameters("actor").values())
    practice = Practice("ptx", [row.prompt_ids for row in ROWS], [row.chosen_ids for row in ROWS], 0.5, relative, 5)
    practising = Practising({}, built, ppo.progress, ppo.world, actor, ppo.config, 0)
    practising.practices = [practice]
    _nll(built, practice.draw(0, 3, 1, 0, built.device)).backward()
    extra = [p.grad.clone() for p in actor]
    before = [torch.randn_like(p) for p in actor]
    for parameter, gradient in zip(actor, before, strict=True):
        parameter.grad = gradient.clone()
    found = practising.add((3, 1), size, "here")
    assert found.item() == pytest.approx(_nll(built, practice.draw(0, 3, 1, 0, built.device)).item(), rel=1e-5)
    length = lambda gradients: torch.cat([g.flatten() for g in gradients]).norm()  # noqa: E731
    factor = 0.5 * length(before) / length(extra) if relative else 0.5
    for parameter, gradient, ours in zip(actor, before, extra, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + factor * ours, rtol=1e-4, atol=1e-5)


def test_draws_depend_on_the_place_alone():
    practice = Practice("ptx", [(5,)] * 24, [row.chosen_ids for row in ROWS], 0.5, True, 4)
    again = [practice.draw(0, 2, 1, 0, torch.device("cpu")).responses() for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != practice.draw(0, 2, 2, 0, torch.device("cpu")).responses()
    few = replace(practice, prompts=[(5,)], answers=[(6, 2)])
    assert few.draw(0, 1, 1, 0, torch.device("cpu")).responses() == [[6, 2]] * 4


@pytest.mark.parametrize("name", ["ptx", "rehearsal"])
def test_what_is_practised_is_not_forgotten(name):
    """A reward that pays for other words; answers of the pairs get likelier with practice, and less likely without."""
    changes = {
        "steps": 8,
        "rollout": RolloutSettings(batch_size=16, max_new_tokens=6),
        "minibatch_size": 16,
        "kl": KLSettings(coef=0.0),
        "optimizer": OptimizerSettings(learning_rate=5e-3),
    }
    batch = Experience.from_lists([row.prompt_ids for row in ROWS], [row.chosen_ids for row in ROWS], 0, torch.device("cpu"))
    after = {}
    for practised in (True, False):
        own = {name: replace(PTX, coef=1.0) if name == "ptx" else replace(REHEARSAL, share=1.0)} if practised else {}
        built = model()
        ppo = trainer(built, config(**changes, **own))
        ppo.train()
        after[practised] = _nll(built, batch).item()
        assert (f"practice/{name}_nll" in ppo.run.steps[-1][1]) == practised
    assert after[True] < after[False] - 0.1


def test_the_best_of_each_kind_are_rehearsed():
    built = model()
    randomise(built)
    settings = config(rehearsal=REHEARSAL)
    kept = select_rehearsed(built, ROWS, settings, [2], 0)
    scores = reward_scores(built, [r.prompt_ids for r in ROWS], [r.chosen_ids for r in ROWS], [2], pad_id=0)
    assert 3 <= len(kept) < len(ROWS)
    assert max(range(len(ROWS)), key=scores.__getitem__) in kept
    assert kept == select_rehearsed(built, ROWS, settings, [2], 0)


def test_scores_and_mean_states_are_of_one_pass():
    built = model()
    randomise(built)
    prompt_ids, answers = [row.prompt_ids for row in ROWS[:5]], [row.chosen_ids for row in ROWS[:5]]
    scores, means = scores_and_means(built, prompt_ids, answers, [2], pad_id=0, rows=2)
    assert scores.tolist() == pytest.approx(reward_scores(built, prompt_ids, answers, [2], pad_id=0), abs=1e-5)
    for row in range(5):
        alone = Experience.from_lists([prompt_ids[row]], [answers[row]], 0, built.device).sequences()
        with built.role("reward"), torch.no_grad():
            states = built.hidden_states(alone.input_ids)[0, len(prompt_ids[row]) :]
        torch.testing.assert_close(means[row], states.float().mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("after", [3, pytest.param(9, marks=pytest.mark.long)])
def test_a_run_that_practises_goes_on_with_the_same_bits(after, monkeypatch):
    settings = config(ptx=PTX, rehearsal=REHEARSAL, update_order="in-turn")
    whole = model()
    uncut = trainer(whole, settings)
    uncut.train()
    built = model()
    first = trainer(built, settings)
    with monkeypatch.context() as patch:
        stopping_after(patch, after)
        with pytest.raises(StopRequested):
            first.train()
    again = trainer(built, settings)
    again.load(carried(first.state()))
    again.train()
    assert again.progress.rehearsed == uncut.progress.rehearsed
    assert_same(trained(built), trained(whole))
    assert metrics(again) == metrics(uncut)[-len(metrics(again)) :]


def test_rows_and_settings_go_together():
    with pytest.raises(ConfigError, match=r"ptx.data='rows' and the ptx rows do not go together"):
        trainer(model(), config(ptx=PTX), ptx=())
    with pytest.raises(ConfigError, match="selects the best answers by the reward head"):
        trainer(hydra(), config(rehearsal=REHEARSAL))
    with pytest.raises(ConfigError, match=r"coef=0.5 has nothing to do without data"):
        PtxSettings(coef=0.5)
    with pytest.raises(ConfigError, match="share=0 must lie in"):
        RehearsalSettings(data="rows", share=0)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """ptx, rehearsal and a running mean; looked at, stopped, gone on with, sampled and exported."""
    from tests.faults.project import make_project, ppo_settings, sft_settings, write

    monkeypatch.chdir(make_project(tmp_path))
    assert main(["sft", write(tmp_path / "sft.yaml", sft_settings(tmp_path, "sft"))]) == 0
    settings = ppo_settings(tmp_path, "ppo") | {"ema_decay": 0.9}
    settings["model"] = {"name_or_path": str(tmp_path / "sft")}
    data = str(tmp_path / "pairs.jsonl")
    settings |= {"ptx": {"data": data, "coef": 2.0}, "rehearsal": {"data": data, "clusters": 2}}
    path = write(tmp_path / "ppo.yaml", settings)
    assert main(["ppo", path, "--dry-run"]) == 0
    assert "ptx.data" in capsys.readouterr().out
    assert main(["ppo", path]) == 0
    log = (tmp_path / "ppo" / "log.txt").read_text()
    assert "ptx.coef=2 is above 1" in log
    assert "rehearsal: " in log
    last = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["practice/ptx_nll"] > 0
    assert last["eval/ema_scores"] is not None
    assert main(["generate", "ppo", "--prompt", "w1 w2", "--plain", "--role", "actor_ema"]) == 0
    assert main(["export", "ppo", "--role", "actor_ema", "--output", "ema"]) == 0
    assert (tmp_path / "ema" / "config.json").is_file()
    capsys.readouterr()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(line + "\n" for line in (tmp_path / "pairs.jsonl").read_text().splitlines()[:8]))
    longer = settings | {"ptx": {"data": str(other), "coef": 2.0}, "steps": settings["steps"] + 1}
    assert main(["ppo", write(tmp_path / "longer.yaml", longer), "--resume"]) == 2
    assert "ptx changed" in capsys.readouterr().err
