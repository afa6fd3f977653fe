"""Without a critic and with a better one: what is trained, what it learns, and that it goes on with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra_ppo.config.settings import KLSettings, LoraSettings, OptimizerSettings, PPOConfig, RewardSettings, RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.adapters import adapter_parameters
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.manifest import read_manifest
from hydra_ppo.rollout.collect import Passes, collect_experience
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.training import ppo_update
from hydra_ppo.training.ppo import PPOTrainer
from hydra_ppo.training.ppo_advantages import RunningRewards, with_advantages
from tests.families import randomise
from tests.hydra_ppo.training.test_joint_sft import Memo
from tests.hydra_ppo.training.test_ppo import LOW_WORDS
from tests.hydra_ppo.training.test_update_order import assert_same, carried, metrics, stopping_after, trained
from tests.training import DATA, MODEL, RUN, hydra, ppo_config, prompts, tokenizer, write_model

GROUPS = RolloutSettings(batch_size=8, samples_per_prompt=4, max_new_tokens=6, score_batch_size=3)
CLIPPED = replace(LOW_WORDS, score_clip=1.0)
IN_LOSS = KLSettings(coef=0.05, estimator="k3", place="loss")
KINDS: dict[str, dict] = {
    "group": {"advantage": "group", "rollout": GROUPS},
    "Dr.GRPO": {"advantage": "group", "group_std": False, "rollout": GROUPS, "loss_average": "longest", "kl": IN_LOSS},
    "rloo": {"advantage": "rloo", "rollout": GROUPS, "loss_average": "sequences"},
    "GRPOVI": {"advantage": "group", "rollout": GROUPS, "variance_increase": "reference", "group_std": False},
    "GRPOVI by length": {"advantage": "rloo", "rollout": GROUPS, "variance_increase": "length", "reward": CLIPPED},
    "reinforce": {"advantage": "reinforce"},
    "js": {"kl": KLSettings(coef=0.05, estimator="js"), "clip_range_high": 0.28, "dual_clip": 3.0},
    "two critic updates": {"critic_updates_per_actor": 2, "critic_warmup_steps": 1, "critic_lambda": 1.0},
    "two in turn": {"critic_updates_per_actor": 2, "update_order": "in-turn", "actor_lambda": "length", "lambda_alpha": 0.4},
    "bounded": {"value_range": [-1.0, 1.0], "reward": CLIPPED, "kl": IN_LOSS, "bootstrap_truncated": True},
    "ema": {"ema_decay": 0.9},
    "ema without a critic": {"ema_decay": 0.9, "advantage": "reinforce"},
}


def config(kind: str, **changes) -> PPOConfig:
    return ppo_config(**{"reward": LOW_WORDS, "optimizer": OptimizerSettings(learning_rate=2e-3), **KINDS[kind], **changes})


def trainer(model, settings, **options) -> PPOTrainer:
    return PPOTrainer(model, tokenizer(), settings, prompts(), prompts(20)[16:], **{"run": Memo(), **options})


def built(settings: PPOConfig, **options) -> HydraModel:
    return hydra(settings.stage, **options)


LATER = [pytest.param(kind, marks=pytest.mark.long) for kind in ("Dr.GRPO", "rloo", "GRPOVI")]


@pytest.mark.parametrize("kind", ["group", "reinforce", *LATER])
def test_without_a_critic_it_learns(kind):
    rollout = replace(config(kind).rollout, batch_size=32, score_batch_size=32)
    settings = config(
        kind,
        steps=25,
        rollout=rollout,
        minibatch_size=16,
        microbatch_size=16,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        kl=KLSettings(coef=0.0),
    )
    summary = PPOTrainer(built(settings), tokenizer(), settings, prompts(), prompts(40)[16:], run=Memo()).train()
    assert summary["eval_scores_after"] > summary["eval_scores_before"] + 3 * summary["eval_scores_gain_se"]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_the_microbatch_size(kind):
    found = []
    for size in (1, 3, 8):
        settings = config(kind, microbatch_size=size, minibatch_size=8, ppo_epochs=1, steps=1)
        model = built(settings)
        randomise(model)
        ppo = trainer(model, settings)
        gradients: dict[str, torch.Tensor] = {}

        def keep(gradients=gradients, model=model):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        ppo.progress.optimizer.step = keep
        ppo.train()
        found.append(gradients)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.long), 4, pytest.param(7, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(kind, after, monkeypatch):
    settings = config(kind)
    whole = built(settings)
    uncut = trainer(whole, settings)
    uncut.train()

    model = built(settings)
    first = trainer(model, settings)
    with monkeypatch.context() as patch:
        stopping_after(patch, after)
        with pytest.raises(StopRequested):
            first.train()
    again = trainer(model, settings)
    again.load(carried(first.state()))
    again.train()
    assert_same(trained(model), trained(whole))
    for name in ("actor", *(["actor_ema"] if settings.ema_decay else [])):
        found, expected = adapter_parameters(model.base, name), adapter_parameters(whole.base, name)
        assert_same(found, expected)
    assert metrics(again) == metrics(uncut)[len(metrics(uncut)) - len(metrics(again)) :]


@pytest.mark.parametrize("kind", ["group", "reinforce"])
def test_there_is_no_critic_and_no_pass_for_one(kind, monkeypatch):
    settings = config(kind)
    model = built(settings)
    roles = []
    entered = HydraModel.role

    def role(self, name):
        roles.append(name)
        return entered(self, name)

    monkeypatch.setattr(HydraModel, "role", role)
    ppo = trainer(model, settings)
    ppo.train()
    assert "critic" not in roles
    assert set(model.base.peft_config) == {"actor"}
    optimized = {id(p) for group in ppo.progress.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.role_parameters("actor").values()}
    last = ppo.run.steps[-1][1]
    assert {last[name] for name in ("value/mean", "value/loss", "value/explained_variance", "value/grad_norm")} == {None}


def experience(settings: PPOConfig, model: HydraModel | None = None, **options):
    model = model or built(settings)
    randomise(model)
    passes = Passes(critic=settings.has_critic, after_last=settings.bootstrap_truncated)
    rows = [row.ids for row in prompts(2) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    return collect_experience(
        model, rows, settings.rollout, eos_ids=[2], pad_id=0, generator=generator, passes=passes, **options
    )


SCORES = torch.tensor([0.0, 1.0, 2.0, 5.0, 3.0, 3.0, 3.0, 3.0])


def test_a_group_is_compared_by_scores_less_their_penalty():
    settings = config("group", group_std=False, kl=KLSettings(coef=0.5))
    found = with_advantages(batch := experience(settings), SCORES, settings, 0.5)
    paid = SCORES - 0.5 * (batch.old_logprobs - batch.ref_logprobs).sum(dim=1)
    groups = paid.view(2, 4)
    expected = (groups - groups.mean(dim=1, keepdim=True)).flatten()[:, None] * batch.response_mask
    torch.testing.assert_close(found.advantages, expected, rtol=1e-5, atol=1e-5)
    assert not found.returns.any()


def test_a_penalty_in_the_loss_leaves_the_rewards_alone():
    settings = config("Dr.GRPO")
    found = with_advantages(batch := experience(settings), SCORES, settings, 0.5)
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])[:, None] * batch.response_mask
    torch.testing.assert_close(found.advantages, expected)


def test_a_penalty_in_the_loss_pulls_the_actor_back():
    kls = []
    for coef in (0.0, 3.0):
        settings = config("Dr.GRPO", kl=replace(IN_LOSS, coef=coef), steps=8, optimizer=OptimizerSettings(learning_rate=1e-2))
        kls.append(trainer(built(settings), settings).train()["eval_kl"])
    assert kls[1] < 0.5 * kls[0]


def test_reinforce_compares_with_what_came_before():
    settings = config("reinforce", kl=KLSettings(coef=0.0), whiten_advantages=False, baseline_decay=0.9)
    running = RunningRewards()
    batch = experience(settings)
    first = with_advantages(batch, SCORES, settings, 0.0, running)
    assert running.mean == pytest.approx(2.5)
    torch.testing.assert_close(first.advantages, (SCORES - 2.5)[:, None] * batch.response_mask)
    second = with_advantages(batch, SCORES + 1, settings, 0.0, running)
    torch.testing.assert_close(second.advantages, (SCORES + 1 - 2.5)[:, None] * batch.response_mask)
    assert running.mean == pytest.approx(0.9 * 2.5 + 0.1 * 3.5)


def test_scores_are_spread_between_the_bounds_that_are_known():
    """Uniform weights, by hand: in [0, 5] the mean of the first group is 2: one and three fifths of the four get 5."""
    uniform = config("GRPOVI", variance_increase="uniform", kl=KLSettings(coef=0.0))
    batch = experience(uniform)
    found = with_advantages(batch, SCORES, uniform, 0.0)
    spread = torch.tensor([0.0, 0.0, 3.0, 5.0])
    torch.testing.assert_close(found.advantages[:4, 0], spread - 2.0)
    assert not found.advantages[4:].any()
    clipped = replace(uniform, reward=replace(LOW_WORDS, score_clip=8.0, missing_eos_penalty=2.0))
    found = with_advantages(batch, SCORES, clipped, 0.0)  # in [-10, 8]: 48 of 72 above the lowest
    torch.testing.assert_close(found.advantages[:4, 0], torch.tensor([-10.0, 2.0, 8.0, 8.0]) - 2.0)


def test_the_critic_learns_monte_carlo_returns_while_it_warms_up():
    settings = ppo_config(reward=LOW_WORDS, kl=KLSettings(coef=0.0), gae_lambda=0.5)
    batch = experience(settings)
    warm = with_advantages(batch, SCORES, settings, 0.0, warming_up=True)
    torch.testing.assert_close(warm.returns, SCORES[:, None] * batch.response_mask)
    later = with_advantages(batch, SCORES, settings, 0.0)
    assert torch.equal(warm.advantages, later.advantages)
    assert not torch.allclose(later.returns, warm.returns)


def test_what_was_cut_goes_on_in_the_critics_value():
    settings = config("bounded", gae_lambda=1.0, reward=CLIPPED)
    batch = experience(settings)
    ended = [True, False] * 4
    assert batch.after_last is not None
    found = with_advantages(batch, SCORES, settings, 0.05, ended=ended)
    for row, done in enumerate(ended):
        value = SCORES[row] + (0.0 if done else batch.after_last[row])
        assert found.returns[row, 0].item() == pytest.approx(value.item(), abs=1e-5)


def test_the_value_after_the_last_token_is_that_of_a_longer_response():
    model = hydra()
    randomise(model)
    batch = experience(config("bounded"), model)
    longer = [[*response, 5] for response in batch.responses()]
    whole = type(batch).from_lists(batch.prompts(), longer, 0, model.device)
    with model.role("critic"):
        values = model.values(whole.sequences())
    for row in range(len(batch)):
        place = batch.response_lengths[row]
        assert values[row, place].item() == pytest.approx(batch.after_last[row].item(), abs=1e-5)


def test_bounded_values_stay_in_their_range_and_are_saved(tmp_path):
    settings = config("bounded", optimizer=OptimizerSettings(learning_rate=0.5))
    model = built(settings)
    ppo = trainer(model, settings)
    ppo.train()
    with model.role("critic"), torch.no_grad():
        values = model.values(experience(settings, model).sequences())
    assert values.abs().max() <= 1.0
    with torch.no_grad():
        model.heads["value"].weight.mul_(1e6)
        with model.role("critic"):
            assert model.values(experience(settings, model).sequences()).abs().max() <= 1.0
    model.save_pretrained(tmp_path / "run")
    assert read_manifest(tmp_path / "run")["value_range"] == [-1.0, 1.0]


def test_the_running_mean_is_what_the_steps_make_of_it(monkeypatch):
    """By hand: after each optimizer step nine tenths of itself and a tenth of the actor."""
    settings = config("ema", steps=1)
    model = built(settings)
    ppo = trainer(model, settings)
    names = list(adapter_parameters(model.base, "actor"))
    expected = {n: p.detach().clone() for n, p in adapter_parameters(model.base, "actor_ema").items()}
    real = ppo_update.Updates.optimizer_step

    def step(self, roles):
        found = real(self, roles)
        for name, value in adapter_parameters(model.base, "actor").items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach()
        return found

    monkeypatch.setattr(ppo_update.Updates, "optimizer_step", step)
    ppo.train()
    found = adapter_parameters(model.base, "actor_ema")
    for name in names:
        torch.testing.assert_close(found[name].detach(), expected[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(found[n], adapter_parameters(model.base, "actor")[n]) for n in names)
    assert not any(p.requires_grad for p in found.values())
    last = ppo.run.steps[-1][1]
    assert last["eval/ema_scores"] is not None
    assert last["eval/ema_kl"] != last["eval/kl"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A base and an adapter of rank 4 on it, which says something."""
    folder = tmp_path_factory.mktemp("tuned")
    base = write_model(folder / "base")
    model = HydraModel.from_pretrained(base, train="sft", lora=LoraSettings(r=4, alpha=8), dtype="fp32")
    randomise(model)
    model.save_pretrained(folder / "sft")
    return folder / "sft"


def test_a_larger_rank_starts_as_the_same_function(tuned):
    batch = experience(ppo_config(), HydraModel.from_pretrained(tuned, dtype="fp32")).sequences()
    model = HydraModel.from_pretrained(tuned, dtype="fp32", lora=LoraSettings(actor_rank=8, critic_rank=16))
    shapes = {name: (config.r, config.lora_alpha) for name, config in model.base.peft_config.items()}
    assert shapes == {"sft": (4, 8), "actor": (8, 16), "critic": (16, 32)}
    with torch.no_grad():
        found, scores = model.reference_and_reward(batch)
        with model.role("actor"):
            torch.testing.assert_close(model.logprobs(batch).logprobs, found, rtol=1e-5, atol=1e-5)
        with model.role("critic"):
            torch.testing.assert_close(model.scores(batch), scores, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tuned.parent / "ppo")
    again = HydraModel.from_pretrained(tuned.parent / "ppo", dtype="fp32", lora=LoraSettings(actor_rank=8))
    assert again.base.peft_config["actor"].r == 8
    with pytest.raises(ConfigError, match=r"rank=16 is asked for 'actor', and the saved one has 8; leave it out"):
        HydraModel.from_pretrained(tuned.parent / "ppo", lora=LoraSettings(actor_rank=16))


def test_a_smaller_rank_is_refused_where_there_is_something_to_copy(tuned):
    with pytest.raises(ConfigError, match=r"rank=2 is below the 4 of adapter 'sft', of which it is to start as an exact copy"):
        HydraModel.from_pretrained(tuned, lora=LoraSettings(critic_rank=2))
    model = hydra(lora=LoraSettings(r=4, alpha=8, actor_rank=1))  # a base without an adapter
    assert model.base.peft_config["actor"].r == 1


REFUSED = [
    ({"advantage": "group"}, "rollout.samples_per_prompt=1 leaves advantage='group' nothing to compare"),
    ({"advantage": "rloo", "rollout": GROUPS, "group_std": False}, "group_std=False is of advantage='group'"),
    (
        {"advantage": "reinforce", "critic_lambda": 1.0},
        "critic_lambda=1.0 is of the critic, and advantage",
    ),
    ({"advantage": "reinforce", "update_order": "in-turn"}, "update_order='in-turn' is of the critic"),
    ({"advantage": "group", "rollout": GROUPS, "gamma": 0.9}, "gamma=0.9 discounts tokens"),
    ({"variance_increase": "uniform"}, "variance_increase='uniform' is of advantage='group' or 'rloo'"),
    ({"baseline_decay": 0.5}, "baseline_decay=0.5 is of advantage='reinforce'"),
    ({"lambda_alpha": 0.5}, "lambda_alpha=0.5 is of actor_lambda='length'"),
    ({"dual_clip": 1.0}, "dual_clip=1.0 must be greater than 1"),
    ({"ema_decay": 1.0}, r"ema_decay=1.0 must lie in \(0, 1\)"),
    ({"value_range": [0.0, 1.0]}, "and scores have no bounds; set reward.score_clip"),
    ({"value_range": [1.0, 0.0]}, "is not a lower and a higher bound"),
    ({"value_range": [-1.0, 1.0], "reward": RewardSettings(score_clip=1.0)}, "the penalty in the rewards has no bounds"),
    (
        {"value_range": [-1.0, 1.0], "reward": RewardSettings(score_clip=1.0, missing_eos_penalty=1.0), "kl": IN_LOSS},
        r"is narrower than the scores, which lie in \[-2, 1\]",
    ),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED, ids=str)
def test_what_contradicts_is_refused(changes, line):
    with pytest.raises(ConfigError, match=line):
        ppo_config(**changes)


def test_penalties_that_do_nothing_are_refused():
    with pytest.raises(ConfigError, match="estimator='k1' in the loss has a gradient that is 0 on average"):
        KLSettings(place="loss")
    with pytest.raises(ConfigError, match="adaptive=True steers a penalty, and estimator='none' has none"):
        KLSettings(estimator="none", adaptive=True)


def test_a_critics_rank_without_a_critic_is_refused():
    model = replace(MODEL, lora=LoraSettings(critic_rank=4))
    with pytest.raises(ConfigError, match=r"model.lora.critic_rank=4 is of the critic, and advantage='reinforce' has none"):
        PPOConfig(model=model, data=DATA, run=RUN, advantage="reinforce")


def test_a_model_of_another_stage_is_refused():
    settings = config("reinforce")
    with pytest.raises(ConfigError, match="is at stage 'ppo', PPO needs 'policy' for advantage='reinforce'"):
        trainer(hydra(), settings)
