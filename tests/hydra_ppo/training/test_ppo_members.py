"""PPO on a reward model of several heads: what is kept, scored and told, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydra_ppo.config.settings import RewardSettings, RewardSource, RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.heads import HeadPlan
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import collect_experience
from hydra_ppo.rollout.scoring import reward_scores
from hydra_ppo.training.ppo import PPOTrainer
from tests.families import randomise
from tests.hydra_ppo.training.test_joint_sft import Memo
from tests.training import llama, ppo_config, prompts, tokenizer

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def model_of(plan: HeadPlan, **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(llama(), heads=plan, **options)
    randomise(model)
    with torch.no_grad():
        model.architecture.output_embeddings.weight.mul_(10)
    model.reward_head_trained = True
    return model


def head(aggregate: str = "mean", **changes) -> RewardSettings:
    return RewardSettings(isolation="thread", sources=[RewardSource("head", aggregate=aggregate, **changes)])


def collected(model, **changes):
    settings = RolloutSettings(**({"batch_size": 6, "max_new_tokens": 4, "score_batch_size": 2} | changes))
    ids = [row.ids for row in prompts(6)]
    return collect_experience(model, ids, settings, eos_ids=[2], pad_id=0, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("plan", [HeadPlan(7), HeadPlan(7, expected=True)], ids=str)
def test_members_are_kept_whole_in_any_order(plan):
    """Seven heads are more than the four response tokens that other columns are cut to."""
    model = model_of(plan)
    found = collected(model)
    assert found.members.shape == (6, 7)
    with torch.no_grad(), model.role("reward"):
        torch.testing.assert_close(found.members, model.members(found.sequences()), **CLOSE)
    torch.testing.assert_close(found.members.mean(dim=1), found.scores, **CLOSE)
    assert torch.equal(found.select([4, 1]).members, found.members[[4, 1]])
    again = reward_scores(model, found.prompts(), found.responses(), [2], pad_id=0)
    assert again == pytest.approx(found.scores.tolist(), abs=2e-5)


def test_one_head_keeps_no_members():
    assert collected(model_of(HeadPlan())).members is None


def test_an_expected_reward_is_taken_off_the_scores():
    model = model_of(HeadPlan(expected=True))
    with_it = collected(model)
    expected = model.heads["expected"].weight.detach().clone()
    with torch.no_grad():
        model.heads["expected"].weight.zero_()
    without = collected(model)
    assert with_it.responses() == without.responses()
    for row, (prompt, difference) in enumerate(zip(prompts(6), (without.scores - with_it.scores).tolist(), strict=True)):
        with torch.no_grad(), model.role("reward"):
            state = model.architecture.backbone(input_ids=torch.tensor([prompt.ids])).last_hidden_state[0, -1]
        assert difference == pytest.approx((expected[0] @ state).item(), abs=1e-4), row


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "an adapter of its own"])
def test_members_cost_no_pass(separate, tmp_path):
    """As many passes as with one head: reference and reward in one where they share an adapter, and the critic's."""
    passes = []
    for plan in (HeadPlan(), HeadPlan(5, expected=True)):
        model = model_of(plan, train="reward" if separate else "sft")
        model.architecture.causal_lm.name_or_path = str(base_of(tmp_path))
        model.save_pretrained(tmp_path / f"run-{plan.reward}")
        ppo = HydraModel.from_pretrained(tmp_path / f"run-{plan.reward}")
        count = [0]
        ppo.architecture.layers[0].register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        collected(ppo, score_batch_size=6, max_new_tokens=1)
        passes.append(count[0])
    assert passes[0] == passes[1]


def base_of(folder):
    from tests.training import write_model

    return folder / "base" if (folder / "base").exists() else write_model(folder / "base")


@pytest.mark.parametrize(("aggregate", "coef"), [("mean", 0.1), ("minimum", 0.1), ("variance", 0.5), ("lcb", 2.0)])
def test_scores_are_the_aggregate_and_disagreement_is_told_and_not_added(aggregate, coef):
    model = model_of(HeadPlan(3))
    memo, rows = Memo(), []
    memo.samples = lambda step, found: rows.extend(row for row in found if not row.get("held_out"))
    config = ppo_config(reward=head(aggregate, aggregate_coef=coef, weight=2.0), steps=1, minibatch_size=8)
    trainer = PPOTrainer(model, tokenizer(), config, prompts()[:12], prompts()[12:], run=memo)
    kept = []
    collect = trainer._collect
    trainer._collect = lambda *a, **k: kept.append(collect(*a, **k)) or kept[-1]
    trainer.train()
    members = kept[1].members  # the first are held-out prompts
    mean, std = members.mean(dim=1), members.std(dim=1)
    wanted = {"mean": mean, "minimum": members.amin(dim=1), "variance": mean - coef * std**2, "lcb": mean - coef * std}[
        aggregate
    ]
    assert [row["score"] for row in rows] == pytest.approx((2 * wanted).tolist(), abs=1e-4)
    assert [row["rewards"]["head"] for row in rows] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert [row["rewards"]["head/spread"] for row in rows] == pytest.approx(std.tolist(), abs=1e-5)
    (_, metrics) = memo.steps[1]
    assert metrics["objective/scores"] == pytest.approx(2 * wanted.mean().item(), abs=1e-4)
    assert metrics["reward/head/spread"] == pytest.approx(std.mean().item(), abs=1e-5)
    apart = members - members.roll(-1, 0)
    disagree = [bool((row > 0).any() and (row < 0).any()) for row in apart]
    assert metrics["reward/head/disagree"] == pytest.approx(sum(disagree) / 8)
    assert metrics["eval/reward/head/spread"] == pytest.approx(kept[-1].members.std(dim=1).mean().item(), abs=1e-5)
    assert 0 <= metrics["eval/reward/head/disagree"] <= 1


def test_one_head_tells_no_disagreement():
    memo = Memo()
    config = ppo_config(reward=head(), steps=1)
    PPOTrainer(model_of(HeadPlan()), tokenizer(), config, prompts()[:12], prompts()[12:], run=memo).train()
    assert {name for name in memo.steps[1][1] if "reward/" in name} == {"reward/head", "eval/reward/head", "reward/length_r2"}


def test_heads_that_are_no_source_are_not_told():
    memo = Memo()
    source = RewardSource("function", "tests.training:count_low_tokens")
    config = ppo_config(reward=RewardSettings(isolation="thread", sources=[source]), steps=1)
    PPOTrainer(model_of(HeadPlan(3)), tokenizer(), config, prompts()[:12], prompts()[12:], run=memo).train()
    names = {name for name in memo.steps[1][1] if "reward/" in name}
    assert names == {"reward/count_low_tokens", "eval/reward/count_low_tokens", "reward/length_r2"}


def test_an_aggregate_of_one_head_is_refused():
    config = ppo_config(reward=head("minimum"))
    line = r"reward.sources\[0\].aggregate='minimum' needs a model with several reward heads, this one has 1"
    with pytest.raises(ConfigError, match=line):
        PPOTrainer(model_of(HeadPlan()), tokenizer(), config, prompts())
    PPOTrainer(model_of(HeadPlan()), tokenizer(), replace(config, reward=head()), prompts())
