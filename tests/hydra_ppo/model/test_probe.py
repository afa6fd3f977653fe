"""The probe finds what is wrong with a pass without being told what family it is of."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.model import architecture as parts
from hydra_ppo.model import probe as probe_module
from hydra_ppo.model.classifier import as_classifier
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.probe import probe
from hydra_ppo.model.role_model import RoleModel
from tests.families import FAMILIES, randomise
from tests.survey.tiny import tiny_config, tiny_model


def llama(**options) -> HydraModel:
    torch.manual_seed(0)
    return HydraModel(AutoModelForCausalLM.from_config(FAMILIES["llama"]), **options)


def refused(model: HydraModel, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        probe(model, "fast", quantised=False)


def wrap(module: torch.nn.Module, change) -> None:
    """Let `change(output, *args)` be what a module returns."""
    plain = module.forward
    module.forward = lambda *args, **kwargs: change(plain(*args, **kwargs), *args)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-neox", "opt-projected"])
@pytest.mark.parametrize("check", ["fast", "full"])
def test_it_leaves_a_model_as_it_was(family, check):
    torch.manual_seed(0)
    model = HydraModel(AutoModelForCausalLM.from_config(FAMILIES[family]), trunk_layers=1, check="off")
    randomise(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model, check, quantised=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.checkpointing
    assert model.adapters.active is None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gemma3_text"])
def test_a_policy_that_sees_what_comes(model_type):
    config = tiny_config(model_type)
    config.is_decoder = False
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError, match=r"a token sees those after it .*decoder-only causal LM"):
        HydraModel(AutoModelForCausalLM.from_config(config))


def test_rows_that_mix():
    model = llama()
    wrap(model.architecture.layers[1].mlp, lambda out, *_: out + out.mean(dim=0, keepdim=True))
    refused(model, "a row depends on the rows beside it")


def test_rows_that_mix_a_little_by_batch_are_said_and_taken(caplog):
    """As int8 does on a GPU."""
    model = llama()
    wrap(model.architecture.layers[1].mlp, lambda out, *_: out + 0.02 * out.mean(dim=0, keepdim=True))
    with caplog.at_level("WARNING", "hydra_ppo"):
        probe(model, "fast", quantised=True)
    assert "a row's numbers depend on the rows beside it: by 0." in caplog.text
    assert "model.quantization=nf4 has no such effect" in caplog.text
    caplog.clear()
    probe(llama(), "fast", quantised=True)
    assert not caplog.text


def test_an_adapter_that_does_more_than_lora():
    model = llama()
    layer = next(part for part in model.base.modules() if isinstance(part, LoraLayer))
    wrap(layer, lambda out, *_: out if layer.disable_adapters else out * 1.1)
    refused(model, "adapter 'actor' changes the pass with weights of zero")


def test_adapters_inside_the_trunk():
    """What PEFT did to fused experts, whose adapters `layers_to_transform` does not bind."""
    model = llama(trunk_layers=2)
    randomise(model)
    layer = model.architecture.layers[0].mlp.up_proj
    wrap(layer, lambda out, *_: out + (0.1 if model.adapters.active == "critic" else 0.0))
    refused(model, r"what leaves the trunk is another thing in another role .*; set model.trunk_layers=0")


def test_noise_that_a_config_asks_for(monkeypatch):
    """PhiMoE's router draws random numbers in training mode; the base is kept out of that mode, or else refused."""
    assert HydraModel(tiny_model("phimoe"))
    monkeypatch.setattr(RoleModel, "train", torch.nn.Module.train)
    with pytest.raises(UnsupportedModelError, match="training mode and evaluation mode give different numbers"):
        HydraModel(tiny_model("phimoe", router_jitter_noise=0.5, input_jitter_noise=0.5))


def test_a_layer_that_remembers():
    model, seen = llama(), []

    def drift(out, *_):
        seen.append(0)
        return out * (1 + 0.2 * (len(seen) % 3))

    wrap(model.architecture.layers[1].mlp, drift)
    with pytest.raises(UnsupportedModelError):
        probe(model, "fast", quantised=False)


def test_gradients_that_recomputing_changes(monkeypatch):
    """Recomputed in another role than that of its forward pass, a layer has another adapter's numbers."""
    model = llama()
    randomise(model)
    monkeypatch.setattr(model, "_as_now", lambda: model.adapters.using("critic"))
    refused(model, r"gradients differ where activations are recomputed.*gradient_checkpointing=false")


def test_whatever_a_pass_raises_is_one_line():
    model = llama()

    def fail(*_args, **_kwargs):
        raise RuntimeError("shape '[2, 3]' is invalid\nand more")

    model.architecture.layers[1].mlp.forward = fail
    with pytest.raises(UnsupportedModelError) as caught:
        probe(model, "fast", quantised=False)
    assert "a pass over a few tokens raises RuntimeError (shape '[2, 3]' is invalid)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_off_and_unknown():
    model = llama(check="off")
    assert model.check == "off"
    with pytest.raises(ConfigError, match=r"model.check='slow' is unknown; choose fast, full or off"):
        llama(check="slow")


def test_experts_may_tip_over_in_half_precision_alone():
    assert probe_module.few_of(torch.float32) == 0
    assert probe_module.few_of(torch.bfloat16) == probe_module.FEW


@pytest.mark.parametrize(("model_type", "scale"), [("cohere", 0.25), ("granite", 0.25), ("minicpm3", 4.0)])
def test_scales_are_found_by_their_numbers(model_type, scale):
    """Not by what a config calls them: their names are unknown to the code."""
    assert HydraModel(tiny_model(model_type)).architecture.scale == scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "cap"), [("gemma2", 30.0), ("recurrent_gemma", 30.0)])
def test_caps(model_type, cap, dtype):
    assert HydraModel(tiny_model(model_type).to(dtype)).architecture.softcap == cap


def test_a_check_that_is_off_still_finds_the_scale():
    """It is what log-probs are computed with, and no matter of trust."""
    assert HydraModel(tiny_model("cohere"), check="off").architecture.scale == 0.25


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_what_lies_between_backbone_and_head(model_type):
    model = HydraModel(tiny_model(model_type))
    assert model.architecture.through_model
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.causal_lm(input_ids=ids).logits
    torch.testing.assert_close(model.architecture.lm_head().logits(model.hidden_states(ids)), expected.detach())


def test_routers_are_no_linear_layers():
    model = tiny_model("llama4_text")
    routers = [m for m in model.modules() if type(m).__name__ == "Llama4Router"]
    assert routers
    assert not any(parts.is_linear(router) for router in routers)
    falcon = tiny_model("falcon")
    assert parts.is_linear(falcon.transformer.h[0].self_attention.query_key_value)  # a kind of its own, and a product


def test_a_head_behind_the_backbone_leaves_as_no_classifier():
    model = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match="its heads read what lies behind the backbone"):
        as_classifier(model, torch.zeros(1, 64), 0, 2, "reward")
