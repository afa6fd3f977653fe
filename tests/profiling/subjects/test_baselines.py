"""The four baselines train as their table says, behind the interface of the trainer."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hydra_ppo.errors import ConfigError, RoleError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.roles import Stage
from hydra_ppo.profiling.subjects.baselines import METHODS, STAGES, SeparateModels, build
from hydra_ppo.training.ppo import PPOTrainer
from tests.training import llama, ppo_config, prompts, tokenizer

SAME = 1e-5
"""Largest relative difference between numbers of two methods that compute the same."""


def load(stage: Stage) -> HydraModel:
    """A base that is the same every time, with adapters and heads that do something."""
    torch.manual_seed(0)
    model = HydraModel.from_config(llama(), train=stage)
    model.reward_head_trained = True
    with torch.no_grad():
        model.architecture.output_embeddings.weight.mul_(10)
        for name in sorted(n for n, _ in model.named_parameters() if "lora_" in n):
            # j-hydra's one adapter is called actor too; by its name a critic's is the same wherever it is
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for head in model.heads.values():
            head.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(1)))
    return model


def trained(method: str, steps: int = 2) -> tuple[PPOTrainer, dict[str, float]]:
    model = build(method, load)
    trainer = PPOTrainer(model, tokenizer(), ppo_config(), prompts())
    for step in range(1, steps + 1):
        metrics = trainer.step(step)
    return trainer, metrics


def test_hydra_dlora_and_lora_are_the_same_policy_gradient_method():
    """They differ in where frozen weights are, so every metric and every trained weight is the same."""
    (hydra, expected), *others = [trained(method) for method in ("hydra", "dlora", "lora")]
    for trainer, metrics in others:
        for name, value in expected.items():
            assert metrics[name] == (None if value is None else pytest.approx(value, rel=SAME, abs=1e-6)), name
        for role in ("actor", "critic"):
            mine = trainer.model.role_parameters(role)
            for name, parameter in hydra.model.role_parameters(role).items():
                torch.testing.assert_close(mine[name], parameter, rtol=1e-4, atol=1e-6)


def test_full_trains_actor_and_critic_and_leaves_reference_and_reward_alone():
    trainer, _ = trained("full")
    fresh = {name: load(stage) for stage in STAGES["full"] for name in stage.roles}
    for name, untouched in fresh.items():
        model = trainer.model._homes[name]
        changed = any(
            not torch.equal(a, b)
            for (key, a), (_, b) in zip(model.causal_lm.named_parameters(), untouched.causal_lm.named_parameters(), strict=True)
            if "lm_head" not in key
        )
        assert changed == (name in ("actor", "critic")), name


def test_j_hydra_has_one_adapter_for_actor_and_critic():
    trainer, _ = trained("j-hydra")
    actor = {id(p) for p in trainer.model.role_parameters("actor").values()}
    critic = trainer.model.role_parameters("critic")
    assert {id(p) for n, p in critic.items() if "head" not in n} == actor
    assert len(trainer.progress.optimizer.param_groups[1]["params"]) == 1  # the value head; the adapter counts once
    assert trainer.model.stage.adapters == ["actor"]


def test_models_without_the_causal_head_role_have_none():
    model = build("lora", load)
    assert isinstance(model, SeparateModels)
    sizes = {name: home.architecture.output_embeddings.weight.shape[0] for name, home in model._homes.items()}
    assert sizes == {"actor": 32, "critic": 0, "reference": 32, "reward": 0}


def test_roles_nest_across_models_and_come_back_after_an_exception():
    model = build("dlora", load)
    with model.role("actor"):
        with contextlib.suppress(ZeroDivisionError), model.role("reward"):
            assert model.current_role == "reward"
            raise ZeroDivisionError
        assert model.current_role == "actor"
    assert model.current_role is None
    with pytest.raises(RoleError, match="role='judge' does not exist"), model.role("judge"):
        pass


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="methods='trio' is unknown; choose among full, lora"):
        build("trio", load)
    assert METHODS == ("full", "lora", "dlora", "j-hydra", "hydra")
