"""Checkpointing of decoder layers without transformers' own hook."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hydra_ppo.compute.recompute import RecomputedForward, enable_recompute, remove_recompute
from tests.families import FAMILIES, randomise, sequences
from tests.training import hydra, llama

IDS = torch.tensor([[5, 6, 7, 8, 9]])


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, x, past_key_values=None, scale=1.0):
        self.calls += 1
        return torch.sin(self.weight * x) * scale, None


def passes(layer: Layer, **options) -> int:
    """Run forward and backward; return how often the layer ran."""
    layer.calls = 0
    layer(torch.ones(3), **options)[0].sum().backward()
    return layer.calls


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_runs_again_in_the_backward_pass_while_enabled(training):
    layer = Layer().train(training)
    enable_recompute([layer])
    assert passes(layer) == 2
    with torch.no_grad():
        layer.calls = 0
        layer(torch.ones(3))
    assert layer.calls == 1
    enable_recompute([layer], enabled=False)
    assert passes(layer) == 1


def test_values_options_and_gradients_are_the_same():
    plain, wrapped = Layer(), Layer()
    enable_recompute([wrapped])
    x = torch.linspace(-1, 1, 5)
    for layer in (plain, wrapped):
        layer(x, scale=3.0)[0].sum().backward()
    torch.testing.assert_close(wrapped(x, scale=3.0)[0], plain(x, scale=3.0)[0], rtol=0, atol=0)
    torch.testing.assert_close(wrapped.weight.grad, plain.weight.grad, rtol=0, atol=0)


def test_a_cache_is_filled_once():
    layer = Layer()
    enable_recompute([layer])
    assert passes(layer, past_key_values=object()) == 1


def test_a_layer_is_wrapped_once_and_unwrapped_whole():
    layer = Layer()
    enable_recompute([layer])
    enable_recompute([layer])
    assert not isinstance(layer.forward.inner, RecomputedForward)
    remove_recompute([layer])
    remove_recompute([layer])
    assert "forward" not in vars(layer)
    assert passes(layer) == 1


def test_what_another_library_put_there_stays():
    layer = Layer()
    own = layer.forward
    calls = []

    def hooked(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = hooked
    enable_recompute([layer])
    assert passes(layer) == 2
    assert len(calls) == 2
    remove_recompute([layer])
    assert layer.forward is hooked


def test_a_deep_copy_runs_its_own_weights():
    layer = Layer()
    enable_recompute([layer])
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.fill_(0.5)
    torch.testing.assert_close(twin(torch.ones(1))[0], torch.sin(torch.tensor([0.5])))
    assert passes(twin) == 2
    assert layer.calls == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_evaluation_mode_are_those_without_checkpointing(family):
    from hydra_ppo.model.hydra import HydraModel

    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family])
    randomise(model)
    found = []
    for enabled in (False, True):
        model.eval().enable_checkpointing(enabled)
        model.zero_grad()
        with model.role("actor"):
            loss = model.logprobs(sequences()).logprobs.sum()
        with model.role("critic"):  # both passes first: each layer is recomputed in the role that its pass had
            loss = loss + model.values(sequences()).sum()
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0)


def test_a_model_that_is_trained_whole():
    plain = AutoModelForCausalLM.from_config(llama()).train()
    wrapped = copy.deepcopy(plain)
    enable_recompute(wrapped.model.layers)
    for model in (plain, wrapped):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0, msg=name)


def test_sampling_is_not_affected():
    from hydra_ppo.config.settings import RolloutSettings
    from hydra_ppo.rollout.sampling import sample

    model = hydra()
    settings = RolloutSettings(max_new_tokens=4, top_k=1)
    responses = []
    for enabled in (False, True):
        model.enable_checkpointing(enabled)
        responses.append(sample(model, [[5, 6], [7]], settings, [2], torch.Generator()).responses)
    assert responses[0] == responses[1]
