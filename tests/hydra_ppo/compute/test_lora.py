"""The lean LoRA pass equals PEFT's own and keeps less."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.runtime.memory import LiveBytes
from tests.families import FAMILIES, randomise, sequences

SAME = 1e-6


def peft_forward(model: HydraModel) -> HydraModel:
    """Give the layers, and the MLPs that run one of them, their own forward pass back."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) or hasattr(layer, "down_proj"):
            vars(layer).pop("forward", None)
    return model


def build(family: str = "llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    return model


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_and_gradients_are_pefts(family, quantization):
    results = []
    for change in (lambda model: model, peft_forward):
        model = change(build(family, quantization=quantization))
        with model.role("actor"):
            logprobs = model.logprobs(sequences()).logprobs
            logprobs.sum().backward()
        results.append((logprobs, {n: p.grad for n, p in model.role_parameters("actor").items()}))
    (mine, my_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=SAME)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(my_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_bf16_differs_by_rounding_alone():
    model = build(dtype="bf16")
    with torch.no_grad(), model.role("actor"):
        mine = model.hidden_states(sequences().input_ids).float()
        theirs = peft_forward(model).hidden_states(sequences().input_ids).float()
    assert (mine - theirs).abs().max() / theirs.abs().max() < 0.05


def test_without_gradients_nothing_is_kept_and_the_numbers_are_the_same():
    model = build()
    with model.role("critic"):
        expected = model.values(sequences())
        with torch.no_grad():
            torch.testing.assert_close(model.values(sequences()), expected, rtol=1e-6, atol=SAME)


def test_less_is_alive_than_with_pefts():
    peaks = []
    for change in (lambda model: model, peft_forward):
        model = change(build(dtype="bf16", quantization="nf4"))
        model.train()
        live = LiveBytes(model.parameters())
        start = live.bytes
        with live, model.role("actor"):
            model.logprobs(sequences()).logprobs.sum().backward()
        peaks.append(live.peak - start)
    assert peaks[0] < 0.8 * peaks[1]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_runs_under_a_hosts_autocast(quantization):
    """A quantised layer answers in its own compute type where a plain one answers in that of autocast."""
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES["llama"], quantization=quantization)
    randomise(model)
    ids = torch.randint(3, 90, (2, 9))
    with model.role("actor"):
        exact = model.hidden_states(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.hidden_states(ids)
            with torch.no_grad():
                assert torch.equal(model.hidden_states(ids), rounded)
        rounded.float().sum().backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
    assert all(p.grad is not None for n, p in model.role_parameters("actor").items() if "lora_B" in n)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_frozen_adapter_passes_gradients_on(quantization):
    """Hosts make the embeddings' output require gradients, and a reference may have an adapter that nobody trains."""
    gradients = []
    for change in (lambda model: model, peft_forward):
        model = change(build(quantization=quantization))
        for parameter in model.role_parameters("actor").values():
            parameter.requires_grad_(False)
        embedded = []
        model.causal_lm.get_input_embeddings().register_forward_hook(
            lambda layer, args, out, kept=embedded: kept.append(out.requires_grad_()) or out
        )
        with model.role("actor"):
            model.hidden_states(sequences().input_ids).square().sum().backward()
        gradients.append(embedded[0].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
