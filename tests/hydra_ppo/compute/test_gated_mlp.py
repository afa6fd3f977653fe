"""Gated MLPs compute what they did and keep half of it."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import nn

from hydra_ppo.compat import VERSION
from hydra_ppo.compute.gated_mlp import _is_gated
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.runtime.memory import LiveBytes
from tests.families import FAMILIES, randomise, sequences

GATED = [name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3") if name in FAMILIES]

in_todays_shape = pytest.mark.skipif(
    Version("4.50") > VERSION, reason="the MLP of Llama had a second branch, for tensor parallel pretraining, and is left alone"
)


def mlps(model: HydraModel) -> list[nn.Module]:
    return [m for m in model.architecture.layers.modules() if type(m).__name__.endswith("MLP") and hasattr(m, "down_proj")]


def build(family: str, lean: bool, **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    for mlp in mlps(model) if not lean else []:
        vars(mlp).pop("forward", None)
    return model


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("family", GATED)
def test_values_and_gradients_are_those_of_the_modules_own_pass(family, quantization):
    results = []
    for lean in (True, False):
        model = build(family, lean, quantization=quantization)
        with model.role("actor"):
            logprobs = model.logprobs(sequences()).logprobs
            logprobs.sum().backward()
        results.append((logprobs, {n: p.grad for n, p in model.role_parameters("actor").items()}))
    (mine, my_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(my_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@in_todays_shape
@pytest.mark.parametrize("family", GATED)
def test_every_gated_family_is_recognised(family):
    found = mlps(build(family, lean=True))
    assert found
    assert all("forward" in vars(mlp) for mlp in found)


def test_an_mlp_that_does_more_is_left_alone():
    class Clamped(nn.Module):
        def forward(self, x):
            gate = self.gate_proj(x).clamp(max=1.0)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    class Normed(nn.Module):
        def forward(self, x):
            return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    assert not _is_gated(Clamped)
    assert not _is_gated(Normed)


@in_todays_shape
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_two_wide_activations_are_kept_in_place_of_four(role):
    kept = []
    for lean in (True, False):
        model = build("llama", lean)
        live = LiveBytes(model.parameters())
        with live, model.role(role):
            hidden = model.hidden_states(sequences().input_ids)
            kept.append(live.bytes)
        del hidden
    config, (rows, tokens) = FAMILIES["llama"], sequences().input_ids.shape
    wide = rows * tokens * config.intermediate_size * 4
    assert kept[1] - kept[0] == 2 * wide * config.num_hidden_layers


def test_a_trained_base_gets_its_own_gradients():
    results = []
    for lean in (True, False):
        model = build("llama", lean, train="base")
        with model.role("reference"):
            model.logprobs(sequences()).logprobs.sum().backward()
        results.append({n: p.grad for n, p in model.role_parameters("reference").items() if "mlp" in n})
    for name, gradient in results[1].items():
        torch.testing.assert_close(results[0][name], gradient, rtol=1e-4, atol=1e-5)
