"""TRL's step-style trainer as two patches find it: TRL's own, and LLaMA-Factory's. Modules that stand for both hosts."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import pytest
from torch import nn

from hydra_ppo.patches import binding, trl_step
from hydra_ppo.patches.llamafactory_rules import WORKFLOW
from hydra_ppo.patches.llamafactory_run import Run
from hydra_ppo.patches.versions import HostError
from hydra_ppo.views.views import role_views
from tests.hosts import common


class PPOTrainer:
    def __init__(self, config=None, model=None):
        self.config = config

    def batched_forward_pass(self, model, queries, responses, inputs, return_logits=False, response_masks=None):
        return "host"

    def train_minibatch(self, *arguments):
        return "host"

    def step(self, *arguments):
        return "host"

    def loss(self, *arguments):
        return "host"


class CustomPPOTrainer(PPOTrainer):
    def batched_forward_pass(self, model, queries, responses, inputs, return_logits=False, response_masks=None):
        return "LLaMA-Factory"

    def save_model(self, output_dir=None):
        return "LLaMA-Factory"


class Parent(nn.Module):
    pass


def module(name, **attributes):
    found = ModuleType(name)
    vars(found).update(attributes)
    return found


@pytest.fixture
def owners(monkeypatch):
    """The modules and classes that patches bind names of."""
    functions = {name: lambda *_, **__: "host" for name in ("logprobs_from_logits", "entropy_from_logits")}
    names = ("load_model", "create_ref_model", "create_reward_model", "MultiModalDataCollatorForSeq2Seq")
    modules = [
        module("trl", AutoModelForCausalLMWithValueHead=Parent),
        module("trl.trainer.ppo_trainer", PPOTrainer=PPOTrainer, **functions),
        module(WORKFLOW, **dict.fromkeys(names, "host")),
        module("llamafactory.train.ppo.trainer", CustomPPOTrainer=CustomPPOTrainer, **functions),
    ]
    for one in modules:
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return [*modules, PPOTrainer, CustomPPOTrainer]


def attributes(owners):
    return [dict(vars(owner)) for owner in owners]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("first", ["trl", "llamafactory"])
def test_nothing_is_left_whichever_patch_is_undone_last(owners, tmp_path, order, first):
    before = attributes(owners)
    model = common.hydra_model()
    run = Run(tmp_path)
    patches = [lambda: trl_step.apply(model), run.__enter__, lambda: trl_step.apply(model)]
    if first == "llamafactory":
        patches.reverse()
    applied = [patch() for patch in patches]
    assert PPOTrainer.step is not before[4]["step"]
    for number in order:
        one = applied[number]
        one.__exit__(None, None, None)
    assert attributes(owners) == before
    assert binding._installed == {}
    assert role_views(model).reference.passes.observers == []


def test_both_patches_bind_the_trainer_once(owners, tmp_path):
    with trl_step.install_trainer():
        inside = dict(vars(PPOTrainer))
        with Run(tmp_path):
            assert dict(vars(PPOTrainer)) == inside


def test_a_run_that_cannot_bind_leaves_nothing(owners, tmp_path, monkeypatch):
    monkeypatch.delattr(CustomPPOTrainer, "save_model")
    before = attributes(owners)
    with pytest.raises(AttributeError):
        Run(tmp_path).__enter__()
    assert attributes(owners) == before
    assert binding._installed == {}


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_sharding_is_refused_for_views_only(owners, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with trl_step.apply(common.hydra_model()) as applied:
        PPOTrainer(None, nn.Linear(1, 1))
        with pytest.raises(HostError, match=variable):
            PPOTrainer(None, applied["model"])
