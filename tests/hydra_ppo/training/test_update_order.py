"""In-turn, away in the rollout, and every optimizer: the same bits, and nothing lost or done twice where a run is cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from hydra_ppo.config.settings import OptimizerSettings, PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.subjects.baselines import STAGES
from hydra_ppo.runs.checkpoint import TrainerState
from hydra_ppo.runtime.host_tensors import is_on_host
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.training import ppo_update
from hydra_ppo.training.away import TABLES
from hydra_ppo.training.ppo import PPOTrainer
from hydra_ppo.training.ppo_state import PartialStep
from hydra_ppo.training.ppo_update import Updates, build_scaler
from tests.hydra_ppo.training.test_joint_sft import Memo
from tests.hydra_ppo.training.test_ppo import LOW_WORDS, finished_experience
from tests.training import hydra, llama, ppo_config, prompts, tokenizer

LARGE = {"hidden_size": 256, "intermediate_size": 512}
"""So that matrices of adapters of rank 16 have 4096 numbers, and 8 bits."""


def config(name="adamw", offload=False, **changes) -> PPOConfig:
    optimizer = OptimizerSettings(learning_rate=2e-3, weight_decay=0.01, name=name, offload_in_rollout=offload)
    return ppo_config(**{"reward": LOW_WORDS, "optimizer": optimizer, "steps": 3, **changes})


def trainer(model, settings, **options) -> PPOTrainer:
    return PPOTrainer(model, tokenizer(), settings, prompts(), prompts(20)[16:], **{"run": Memo(), **options})


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def metrics(ppo) -> list:
    steps = [found for step, found in ppo.run.steps if step]  # 0 is the evaluation before them
    return [{k: v for k, v in found.items() if not k.startswith(("time", "memory"))} for found in steps]


def whole_run(settings, **model):
    built = hydra(**model)
    before = trained(built)
    ppo = trainer(built, settings)
    ppo.train()
    after = trained(built)
    assert not all(torch.equal(before[name], after[name]) for name in after)
    return after, metrics(ppo)


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, {}),
        ({"critic_warmup_steps": 1}, {"quantization": "nf4"}),
        ({"target_kl": 1e-4, "ppo_epochs": 3}, {}),
        ({"optimizer": OptimizerSettings(learning_rate=2e-3, schedule="cosine", warmup_fraction=0.3)}, {"trunk_layers": 1}),
        ({}, {"dtype": "bf16"}),
        ({}, {"dtype": "fp16"}),
    ],
    ids=["fp32", "warm-up nf4", "early stop", "schedule trunk", "bf16", "fp16"],
)
def test_in_turn_gives_the_bits_of_together(changes, model, monkeypatch):
    """Adapters, value head and every metric after three PPO steps."""
    monkeypatch.setattr("hydra_ppo.training.ppo_begin.build_scaler", small_scaler)
    ours, our_metrics = whole_run(config(update_order="in-turn", **changes), **model)
    theirs, their_metrics = whole_run(config(**changes), **model)
    assert_same(ours, theirs)
    assert our_metrics == their_metrics
    stopped = [step["policy/stopped_early"] for step in our_metrics]
    assert any(stopped) == ("target_kl" in changes)


def small_scaler(*arguments):
    """Build a scaler that has found a scale of which nothing overflows."""
    scaler = build_scaler(*arguments)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0} if scaler.is_enabled() else {})
    return scaler


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-offloaded"])
def test_in_turn_gives_the_bits_of_together_with_every_optimizer(name):
    assert_same(whole_run(config(name, update_order="in-turn"), **LARGE)[0], whole_run(config(name), **LARGE)[0])


def test_offloaded_and_away_give_the_bits_of_adamw():
    plain, plain_metrics = whole_run(config())
    for settings in (config("adamw-offloaded"), config(offload=True), config(offload=True, update_order="in-turn")):
        found, found_metrics = whole_run(settings)
        assert_same(found, plain)
        assert found_metrics == plain_metrics
    eight = whole_run(config("adamw-8bit"), **LARGE)[0]
    assert_same(whole_run(config("adamw-8bit", offload=True), **LARGE)[0], eight)


def test_in_turn_only_one_role_has_gradients():
    model = hydra()
    seen = []

    def look(phase):
        roles = [role for role in ("actor", "critic") if any(p.grad is not None for p in mine[role])]
        seen.append((phase, roles))

    settings = config(update_order="in-turn", ppo_epochs=1, minibatch_size=8, microbatch_size=4)
    ppo = trainer(model, settings, on_phase=look)
    mine = {role: list(model.role_parameters(role).values()) for role in ("actor", "critic")}
    ppo.update(finished_experience(model, settings))
    assert seen == [
        ("update-actor", []),
        ("update-actor", ["actor"]),
        ("optimizer", ["actor"]),
        ("update-critic", []),
        ("update-critic", ["critic"]),
        ("optimizer", ["critic"]),
    ]


def test_the_schedule_goes_one_step_for_both_halves():
    for order in ("together", "in-turn"):
        model = hydra()
        settings = config(update_order=order, ppo_epochs=2, minibatch_size=4)
        ppo = trainer(model, settings)
        ppo.update(finished_experience(model, settings))
        assert ppo.progress.schedule.last_epoch == 4


def stopping_after(monkeypatch, number):
    """Raise a stop at the micro-batch of that number; count them."""
    seen = {"count": 0}

    def check_stop():
        seen["count"] += 1
        if seen["count"] == number:
            raise StopRequested

    monkeypatch.setattr(ppo_update, "check_stop", check_stop)
    return seen


def carried(state: TrainerState) -> TrainerState:
    """Return a state as a checkpoint gives it back."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
    return TrainerState(load(save(tensors)), json.loads(json.dumps(state.values)))


SETTINGS = {
    "adamw": {"update_order": "in-turn"},
    "adamw-8bit": {"update_order": "in-turn", "offload": True, "target_kl": 1e-4},
    "adamw-offloaded": {"update_order": "in-turn", "critic_warmup_steps": 1},
}
"""8 rows in minibatches of 4 and micro-batches of 2: 2 x 2 for each role in an epoch, the critic's last."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_cut_at_any_micro_batch_goes_on_with_the_same_bits(name, monkeypatch):
    settings = config(name, **SETTINGS[name], steps=2, ppo_epochs=1)
    whole, whole_metrics = whole_run(settings, **LARGE)
    between = 0
    for number in (1, 2, 3, 4, 5, 7, 8, 11):
        model = hydra(**LARGE)
        first = trainer(model, settings)
        with monkeypatch.context() as patch:
            stopping_after(patch, number)
            with pytest.raises(StopRequested):
                first.train()
        assert all(p.grad is None for p in model.parameters())
        state = carried(first.state())
        between += bool(state.values["partial"]["turns_done"])
        second = trainer(model, settings)
        second.load(state)
        if settings.optimizer.offload_in_rollout:
            assert all(is_on_host(t) for t in moments(second))
        second.train()
        assert_same(trained(model), whole)
        assert metrics(first) + metrics(second) == whole_metrics
    assert between >= 2


def moments(ppo) -> list[torch.Tensor]:
    states = ppo.progress.optimizer.state.values()
    return [value for state in states for kind, value in state.items() if torch.is_tensor(value) and kind not in TABLES]


def test_memory_that_runs_out_in_the_critic_s_half_does_not_repeat_the_actor_s(monkeypatch):
    settings = config(update_order="in-turn", steps=1, ppo_epochs=1, minibatch_size=8, microbatch_size=4)
    stepped, real = [], Updates.optimizer_step
    failures = [1]

    def step(self, roles):
        stepped.extend(roles)
        return real(self, roles)

    def critic_backward(self, *arguments):
        found = backward(self, *arguments)
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    backward = Updates.critic_backward
    monkeypatch.setattr(Updates, "optimizer_step", step)
    monkeypatch.setattr(Updates, "critic_backward", critic_backward)
    model = hydra()
    ppo = trainer(model, settings)
    ppo.train()
    assert stepped == ["actor", "critic"]
    assert ppo.progress.limits.sizes["microbatch_size"] == 2
    monkeypatch.undo()
    other = hydra()
    trainer(other, settings).train()
    for name, value in trained(other).items():
        if "critic" in name or "value" in name:  # summed in micro-batches of another size
            torch.testing.assert_close(trained(model)[name], value, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(trained(model)[name], value), name


def test_a_checkpoint_of_before_there_was_an_order_goes_on(monkeypatch):
    settings = config(steps=1)
    whole, _ = whole_run(settings)
    model = hydra()
    first = trainer(model, settings)
    with monkeypatch.context() as patch:
        stopping_after(patch, 4)
        with pytest.raises(StopRequested):
            first.train()
    state = carried(first.state())
    del state.values["partial"]["turns_done"]
    again = trainer(model, settings)
    again.load(state)
    again.train()
    assert_same(trained(model), whole)


def test_halves_are_not_taken_together():
    model = hydra()
    settings = config()
    part = PartialStep(finished_experience(model, settings), turns_done=1)
    with pytest.raises(ConfigError, match=r"^update_order='together' cannot go on between the halves of a step; use 'in-turn'"):
        trainer(model, settings).updates.run(part)


def test_roles_that_share_parameters_are_not_stepped_in_turn():
    model = HydraModel.from_config(llama(), train=STAGES["j-hydra"][0])
    with pytest.raises(ConfigError, match=r"^update_order='in-turn' .* the same parameters; use update_order='together' "):
        trainer(model, config(update_order="in-turn"))
    trainer(model, config())


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_moments_are_away_while_responses_are_sampled_and_scored(name):
    where = []

    def look(phase):
        found = {is_on_host(t) for t in moments(ppo)}
        where.append((phase, found.pop() if len(found) == 1 else None))

    def collecting(*arguments, **options):
        look("collect")
        return collect(*arguments, **options)

    ppo = trainer(hydra(), config(name, offload=True, ppo_epochs=1, steps=2), on_phase=look)
    collect, ppo._collect = ppo._collect, collecting
    ppo.train()
    first = [phase for phase, _ in where].index("update-actor")
    assert all(away is None for _, away in where[:first])  # there are none
    later = where[first + 2 :]
    assert {away for phase, away in later if phase in ("rollout", "score", "collect")} == {True}
    assert [phase for phase, away in later if phase == "collect"] == ["collect"] * 2  # the second step's, the last evaluation's
    assert {away for phase, away in later if phase.startswith("update")} <= {False, None}
    assert False in {away for phase, away in later if phase == "update-critic"}


def test_fp16_in_turn_counts_a_step_once(monkeypatch):
    """Together, an overflow keeps both from stepping; in-turn the role that had none steps, and the scale is halved once."""
    found = {}
    monkeypatch.setattr("hydra_ppo.training.ppo_begin.build_scaler", small_scaler)
    for order in ("together", "in-turn"):
        model = hydra(dtype="fp16")
        settings = replace(config(update_order=order, ppo_epochs=1, minibatch_size=8, microbatch_size=8), steps=1)
        ppo = trainer(model, settings)
        real = Updates.actor_backward

        def overflowing(self, *arguments, real=real, **options):
            out = real(self, *arguments, **options)
            self.parameters["actor"][0].grad.fill_(float("inf"))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(Updates, "actor_backward", overflowing)
            before = trained(model)
            ppo.updates.run(PartialStep(finished_experience(model, settings)))
        after = trained(model)
        critic = {id(p) for p in model.role_parameters("critic").values()}
        names = {name for name, p in model.named_parameters() if id(p) in critic}
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        found[order] = (len(moved) > 0, moved <= names, ppo.progress.scaler.get_scale())
        assert ppo.progress.scaler.state_dict()["growth_interval"] == (2000 if order == "together" else 4000)
    assert found == {"together": (False, True, 32.0), "in-turn": (True, True, 32.0)}
