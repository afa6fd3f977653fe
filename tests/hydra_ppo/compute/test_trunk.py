"""The trunk runs once a rollout; with what it left, every pass gives the same numbers to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import score
from tests.families import FAMILIES, experience, randomise

K = 2


def build(family="llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], trunk_layers=K, **options)
    randomise(model)
    return model


class Runs:
    """Counts the tokens that each decoder layer computes on."""

    def __init__(self, model: HydraModel) -> None:
        self.layers = [0] * len(model.architecture.layers)
        for number, layer in enumerate(model.architecture.layers):
            inner = next(m for name, m in layer.named_children() if name in ("input_layernorm", "ln_1", "self_attn_layer_norm"))
            inner.register_forward_hook(lambda _m, _a, out, number=number: self._count(number, out))

    def _count(self, number, out):
        self.layers[number] += out.shape[0] * out.shape[1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_passes_from_the_trunk_are_bit_exact(family):
    model = build(family)
    batch = experience().sequences()
    with model.taking_trunk() as states, torch.no_grad():
        expected = model.reference_and_reward(batch)
    known = dataclasses.replace(batch, trunk=states[0])
    runs = Runs(model)
    with torch.no_grad():
        found = model.reference_and_reward(known)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        with model.role("critic"):
            assert torch.equal(model.values(known), model.values(batch))
    tokens = sum(batch.lengths) if model.packs else batch.input_ids.numel()
    assert runs.layers == [tokens] * K + [3 * tokens] * (len(runs.layers) - K)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradients_from_the_trunk_are_bit_exact(checkpointing, quantization):
    gradients = []
    for cached in (False, True):
        model = build(quantization=quantization)
        model.enable_checkpointing(checkpointing)
        batch = experience().sequences()
        with model.taking_trunk() as states, torch.no_grad():
            model.reference_and_reward(batch)
        if cached:
            batch = dataclasses.replace(batch, trunk=states[0])
        with model.role("actor"):
            model.logprobs(batch).logprobs.sum().backward()
        with model.role("critic"):
            model.values(batch).square().sum().backward()
        gradients.append([p.grad for role in ("actor", "critic") for p in model.role_parameters(role).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g is not None for g in gradients[0])


NO_LOGPROBS = torch.zeros(3, 4)  # scoring only hands on what the sampler had


@pytest.mark.parametrize("place", ["device", "cpu"])
@pytest.mark.parametrize("rows", [2, 16])
def test_scoring_runs_the_trunk_once_and_keeps_what_leaves_it(rows, place):
    model, plain = build(), build()
    plain.trunk = None
    settings = RolloutSettings(batch_size=4, score_batch_size=rows, trunk_cache=place, recompute_logprobs=True)
    expected = score(plain, experience(), NO_LOGPROBS, settings)
    runs = Runs(model)
    found = score(model, experience(), NO_LOGPROBS, settings)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "scores"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert runs.layers[K] == 3 * runs.layers[0]
    assert found.trunk.shape[:2] == (len(found), max(found.lengths))
    assert expected.trunk is None
    # Cut to any rows, it still belongs to their tokens.
    for chosen in ([2, 1], [0], [2, 0, 1]):
        part = found.select(chosen)
        batch = part.sequences()
        with torch.no_grad(), model.role("critic"):
            values, expected = model.values(batch), model.values(dataclasses.replace(batch, trunk=None))
        assert torch.equal(values[part.response_mask], expected[part.response_mask])


def test_a_base_that_is_trained_has_no_trunk_to_keep():
    assert HydraModel.from_config(FAMILIES["llama"], train="base", trunk_layers=K).trunk is None
    assert HydraModel.from_config(FAMILIES["llama"]).trunk is None
