"""Several reward heads and an expected reward: what they start as, what one score of them is, and what is saved of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_ppo.errors import ConfigError, RoleError
from hydra_ppo.experience import Experience
from hydra_ppo.model.heads import HeadPlan, head_plan, scalar_heads, settled_plan
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.views.views import role_views
from tests.families import FAMILIES, PROMPTS, RESPONSES, randomise, sequences
from tests.training import ppo_config, sft_config, write_model

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SEVERAL = HeadPlan(reward=3, expected=True)


def build(plan: HeadPlan = SEVERAL, family: str = "llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], heads=plan, **({"train": "sft"} | options))
    randomise(model)
    return model


def states_of(model: HydraModel, role: str, row: int) -> torch.Tensor:
    """Return (T, H) of one row alone, from plain transformers code."""
    ids = torch.tensor([[*PROMPTS[row], *RESPONSES[row]]])
    with model.role(role):
        return model.architecture.backbone(input_ids=ids).last_hidden_state[0]


def test_one_head_starts_at_0_and_members_do_not():
    one = scalar_heads(64, CPU)
    assert {name: tuple(head.weight.shape) for name, head in one.items()} == {"value": (1, 64), "reward": (1, 64)}
    assert all((head.weight == 0).all() for head in one.values())
    several = scalar_heads(64, CPU, replace(SEVERAL, seed=5))
    assert tuple(several["reward"].weight.shape) == (3, 64)
    assert tuple(several["expected"].weight.shape) == (1, 64)
    assert (several["value"].weight == 0).all()
    assert (several["expected"].weight == 0).all()
    members = several["reward"].weight
    assert torch.pdist(members).min() > 0.5
    assert members.std().item() == pytest.approx((1 / 65) ** 0.5, rel=0.1)  # of 192 numbers; a standard error is 5%


def test_members_are_those_of_the_seed():
    def drawn(seed):
        return scalar_heads(64, CPU, HeadPlan(3, seed=seed))["reward"].weight

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


@torch.no_grad()
@pytest.mark.parametrize("plan", [HeadPlan(1), HeadPlan(3), HeadPlan(1, expected=True), SEVERAL], ids=str)
@pytest.mark.parametrize("packing", [True, False])
def test_scores_and_members_equal_plain_code(plan, packing):
    model = build(plan, packing=packing)
    with model.role("reward"):
        scores, members = model.scores(sequences()), model.members(sequences())
    _, together, each = model.reference_and_members(sequences())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        states = states_of(model, "reward", row)
        wanted = model.heads["reward"].weight @ states[len(prompt) + len(response) - 1]
        if plan.expected:
            wanted = wanted - model.heads["expected"].weight[0] @ states[len(prompt) - 1]
        torch.testing.assert_close(members[row], wanted, **CLOSE)
        torch.testing.assert_close(scores[row], wanted.mean(), **CLOSE)
    assert torch.equal(scores, together)
    assert torch.equal(members, each)
    assert torch.equal(model.reference_and_reward(sequences())[1], scores)


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in ("llama", "mistral", "gemma3", "gpt2", "opt") if f in FAMILIES])
def test_readings_do_not_depend_on_packing_and_neighbours(family):
    """The columns of a row beyond its end are never asked for; those within are the row's own."""
    columns = torch.tensor([[4, 5, 8], [1, 2, 7], [6, 7, 7]])
    found = []
    for packing in (True, False):
        model = build(family=family, packing=packing)
        with model.role("reward"):
            found.append(model.readings(sequences(), columns))
    for part, other in zip(*found, strict=True):
        torch.testing.assert_close(part, other, rtol=2e-5, atol=2e-5)
    for row in range(3):
        batch = Experience.from_lists([PROMPTS[row]], [RESPONSES[row]], 0, CPU).sequences()
        with model.role("reward"):
            alone = model.readings(batch, columns[row : row + 1])
        for part, other in zip(found[0], alone, strict=True):
            torch.testing.assert_close(part[row], other[0], rtol=2e-5, atol=2e-5)


def test_gradients_end_at_the_heads_where_that_is_asked_for():
    model = build()
    with model.role("reward"):
        found = model.readings(sequences(), heads_only=True)
    (found.members.sum() + found.expected.sum()).backward()
    having = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert having == {"heads.reward.weight", "heads.expected.weight"}


def test_the_reward_role_trains_its_heads():
    assert {n for n in build().role_parameters("reward") if "head" in n} == {
        "reward.reward_head.weight",
        "reward.expected_head.weight",
    }
    assert {n for n in build(HeadPlan(3), train="ppo").role_parameters("critic") if "head" in n} == {"critic.value_head.weight"}


@torch.no_grad()
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_critic_starts_as_the_mean_of_the_members_to_the_last_bit(tmp_path, quantization):
    base = write_model(tmp_path / "base", vocab_size=97)
    sft = HydraModel.from_pretrained(base, train="sft", heads=HeadPlan(3), quantization=quantization)
    randomise(sft)
    sft.reward_head_trained = True
    sft.save_pretrained(tmp_path / "sft")
    ppo = HydraModel.from_pretrained(tmp_path / "sft", quantization=quantization)
    assert ppo.reward_heads == 3
    assert tuple(ppo.heads["value"].weight.shape) == (1, 64)
    with ppo.role("reward"):
        rewards, values = ppo.scores(sequences()), ppo.values(sequences())
    with ppo.role("critic"):
        assert torch.equal(ppo.scores(sequences()), rewards)
        assert torch.equal(ppo.values(sequences()), values)
    ppo.save_pretrained(tmp_path / "ppo")
    again = HydraModel.from_pretrained(tmp_path / "ppo", quantization=quantization)
    assert torch.equal(again.heads["reward"].weight, sft.heads["reward"].weight)
    assert torch.equal(again.heads["value"].weight, ppo.heads["value"].weight)


def saved(tmp_path, plan: HeadPlan, trained: bool = True):
    if not (tmp_path / "base").exists():
        write_model(tmp_path / "base", vocab_size=97)
    model = HydraModel.from_pretrained(tmp_path / "base", train="sft", heads=plan)
    randomise(model)
    model.reward_head_trained = trained
    folder = tmp_path / f"{plan.reward}-{plan.expected}-{trained}"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
@pytest.mark.parametrize("plan", [HeadPlan(3), HeadPlan(1, expected=True), SEVERAL], ids=str)
def test_what_is_saved_comes_back(tmp_path, plan):
    model, folder = saved(tmp_path, plan)
    manifest = json.loads((folder / "hydra.json").read_text())
    assert (manifest["format"], manifest["reward_heads"]) == (2, plan.reward)
    assert ("expected" in manifest["heads"]) == plan.expected
    back = HydraModel.from_pretrained(folder, train="ppo")
    for name, head in model.heads.items():
        assert name == "value" or torch.equal(back.heads[name].weight, head.weight), name
    assert torch.equal(back.reference_and_members(sequences())[2], model.reference_and_members(sequences())[2])


def test_one_head_is_saved_as_before_and_older_folders_are_read(tmp_path):
    """What reads format 1 alone must find it, and must not find what it would take for something else."""
    model, folder = saved(tmp_path, HeadPlan())
    manifest = json.loads((folder / "hydra.json").read_text())
    assert (manifest["format"], manifest["heads"]) == (1, ["reward"])
    assert set(load_file(folder / "heads.safetensors")) == {"reward.weight"}
    del manifest["reward_heads"]  # as it was written before there could be several
    (folder / "hydra.json").write_text(json.dumps(manifest))
    assert torch.equal(HydraModel.from_pretrained(folder).heads["reward"].weight, model.heads["reward"].weight)


@pytest.mark.parametrize("heads", [0, -1, True, "3", 2.0])
def test_a_number_of_heads_that_is_none(tmp_path, heads):
    _, folder = saved(tmp_path, HeadPlan())
    manifest = json.loads((folder / "hydra.json").read_text())
    (folder / "hydra.json").write_text(json.dumps(manifest | {"reward_heads": heads}))
    with pytest.raises(ConfigError, match="holds values of other types than this program writes"):
        HydraModel.from_pretrained(folder)


def test_heads_that_are_not_those_of_the_manifest(tmp_path):
    _, folder = saved(tmp_path, HeadPlan(3))
    save_file({"reward.weight": torch.zeros(2, 64)}, folder / "heads.safetensors")
    with pytest.raises(ConfigError, match=r"has reward.weight of shape \[2, 64\], where the model has 3 of it; save the model"):
        HydraModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("plan", "asked", "line"),
    [
        (HeadPlan(3), HeadPlan(1), "reward_heads=1 does not go with a run whose reward model has 3; use reward_heads=3"),
        (HeadPlan(1), HeadPlan(3), "reward_heads=3 does not go with a run whose reward model has 1; use reward_heads=1"),
        (
            SEVERAL,
            HeadPlan(3),
            "the run was trained with 'advantage', and another loss would leave its expected rewards behind",
        ),
    ],
    ids=str,
)
def test_trained_heads_are_not_lost(tmp_path, plan, asked, line):
    _, folder = saved(tmp_path, plan)
    with pytest.raises(ConfigError, match=line):
        HydraModel.from_pretrained(folder, train="sft", heads=asked)


def test_heads_that_were_never_trained_give_way(tmp_path):
    _, folder = saved(tmp_path, HeadPlan(), trained=False)
    model = HydraModel.from_pretrained(folder, train="sft", heads=HeadPlan(3, seed=4))
    assert torch.equal(model.heads["reward"].weight, scalar_heads(64, CPU, HeadPlan(3, seed=4))["reward"].weight)


def test_an_expected_reward_may_be_learned_later(tmp_path):
    before, folder = saved(tmp_path, HeadPlan(3))
    model = HydraModel.from_pretrained(folder, train="sft", heads=SEVERAL)
    assert torch.equal(model.heads["reward"].weight, before.heads["reward"].weight)
    assert (model.heads["expected"].weight == 0).all()


def test_what_runs_ask_for():
    assert head_plan(ppo_config()) is None
    assert head_plan(sft_config(reward_coef=0.0)) is None
    assert head_plan(sft_config()) == HeadPlan()
    assert head_plan(sft_config(reward_heads=3, reward_loss="advantage")) == HeadPlan(3, expected=True)
    assert settled_plan(None, None) == HeadPlan()


@torch.no_grad()
def test_a_view_says_the_mean_and_follows_the_members():
    model = build(HeadPlan(3), train="ppo")
    view = role_views(model).reward
    batch = sequences()
    mask = torch.arange(batch.input_ids.shape[1])[None] <= batch.last_positions()[:, None]
    expected = model.reference_and_reward(batch)[1]
    torch.testing.assert_close(view(batch.input_ids, attention_mask=mask).logits[:, 0], expected, rtol=2e-5, atol=2e-5)
    assert list(view.parameters()) == []
    model.heads["reward"].weight.mul_(2)
    torch.testing.assert_close(view(batch.input_ids, attention_mask=mask).logits[:, 0], 2 * expected, rtol=2e-5, atol=2e-5)


def test_a_view_does_not_pass_over_the_expected_reward():
    view = role_views(build(HeadPlan(1, expected=True), train="ppo")).reward
    with pytest.raises(RoleError, match="cannot tell what is above a prompt's expected reward"):
        view(torch.tensor([[5, 6, 7]]))
