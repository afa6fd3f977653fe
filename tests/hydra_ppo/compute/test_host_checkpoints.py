"""Checkpoints in host memory: the same bits, and nothing but a layer's input is moved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hydra_ppo.compute import host_checkpoints
from hydra_ppo.compute.host_checkpoints import kept_on_host
from hydra_ppo.compute.recompute import enable_recompute
from hydra_ppo.config.settings import ModelSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.runtime.host_tensors import to_host
from hydra_ppo.runtime.memory import LiveBytes
from tests.families import FAMILIES, randomise, sequences


def build(family: str = "llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    return model


def gradients(model: HydraModel) -> dict[str, torch.Tensor]:
    """Return the gradients of all trainable roles of PPO, whose passes all come before the backward pass."""
    model.zero_grad()
    with model.role("actor"):
        loss = model.logprobs(sequences()).logprobs.sum()
    with model.role("critic"):
        loss = loss + model.values(sequences()).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"quantization": "nf4"}),
        ("llama", {"quantization": "int8"}),
        ("llama", {"trunk_layers": 1}),
        ("llama", {"packing": False}),
        ("qwen2", {"quantization": "nf4", "trunk_layers": 1}),
    ],
    ids=str,
)
def test_gradients_are_the_same_bits(family, options):
    model = build(family, **options)
    model.enable_checkpointing()
    expected = gradients(model)
    model.enable_checkpointing(offload=True)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("stage", ["sft", "reward", "base"])
def test_gradients_of_other_stages_are_the_same_bits(stage):
    found = []
    for offload in (False, True):
        model = build(train=stage)
        model.enable_checkpointing(offload=offload)
        logprobs, scores = model.reference_and_reward(sequences()) if stage == "sft" else (None, None)
        if logprobs is None:
            with model.role("reward"):
                scores = model.scores(sequences())
        (scores.sum() + (0 if logprobs is None else logprobs.sum())).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_one_copy_of_each_layers_input_and_of_nothing_else(monkeypatch):
    """Position embeddings, masks and parameters stay where they are."""
    model = build(packing=False)
    model.enable_checkpointing(offload=True)
    moved = []
    monkeypatch.setattr(host_checkpoints, "to_host", lambda t, **options: moved.append(tuple(t.shape)) or to_host(t, **options))
    gradients(model)
    rows, width = sequences().input_ids.shape
    assert moved == [(rows, width, 64)] * 3 * 2  # layers, roles


def test_the_device_holds_no_layers_input_between_the_passes():
    """Two layers more keep nothing more on the device, and on the host what their inputs take."""
    kept = {}
    for offload in (False, True):
        for layers in (2, 4):
            config = copy.deepcopy(FAMILIES["llama"])
            config.num_hidden_layers = layers
            model = HydraModel.from_config(config)
            model.enable_checkpointing(offload=offload)
            live = LiveBytes([*model.parameters(), *model.buffers()])
            before = live.bytes
            with live, Tracker() as tracker, model.role("actor"):
                hidden = model.hidden_states(sequences().input_ids)
            kept[offload, layers] = (live.bytes - before, tracker.host_bytes)
            del hidden
    size = sequences().input_ids.numel() * 64 * 4
    assert kept[False, 4][0] - kept[False, 2][0] == 2 * size
    assert kept[True, 4][0] == kept[True, 2][0]
    assert (kept[True, 2][1], kept[True, 4][1]) == (2 * size, 4 * size)
    assert kept[False, 4][1] == 0


def test_a_graph_can_be_gone_back_through_twice():
    weight, x = torch.tensor(2.0, requires_grad=True), torch.linspace(-1, 1, 5)
    with kept_on_host(x):
        y = (weight * x).sum()
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(y, weight, retain_graph=True)[0], x.sum(), rtol=0, atol=0)


def test_an_input_that_is_given_by_its_name():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, hidden_states, scale):
            return torch.sin(self.weight * hidden_states) * scale

    layer, x = Layer(), torch.linspace(-1, 1, 5)
    expected = torch.autograd.grad(layer(hidden_states=x, scale=3.0).sum(), layer.weight)
    enable_recompute([layer], offload=True)
    with Tracker() as tracker:
        y = layer(hidden_states=x, scale=3.0)
        assert tracker.host_bytes == 20
    torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.weight), expected, rtol=0, atol=0)


def test_who_switches_checkpointing_on_again_leaves_the_place_as_it_is():
    model = build()
    assert not model.checkpoint_offload
    model.enable_checkpointing(offload=True)
    model.enable_checkpointing(False)
    model.enable_checkpointing()
    assert model.checkpoint_offload
    assert all(layer.forward.offload for layer in model.architecture.layers)


def test_it_needs_checkpointing():
    with pytest.raises(ConfigError, match=r"checkpoint_offload=True moves what gradient checkpointing keeps.*; set model"):
        ModelSettings(name_or_path="base", gradient_checkpointing=False, checkpoint_offload=True)
