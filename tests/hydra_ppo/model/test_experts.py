"""Adapters on fused experts: parameters that hold all experts of a layer at once."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hydra_ppo.cli.export import export_role
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from tests.families import randomise
from tests.survey.tiny import tiny_config

EXPERTS = ["mlp.experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize("trunk", [0, 1])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_they_are_those_of_peft(family, trunk, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / "base")
    settings = LoraSettings(r=4, target_parameters=EXPERTS)
    model = HydraModel.from_pretrained(tmp_path / "base", trunk_layers=trunk, lora=settings)
    randomise(model, seed=1)
    adapted = {
        name.split(".layers.")[1][0] for name, _ in model.base.named_parameters() if "experts" in name and "lora" in name
    }
    assert "0" not in adapted or trunk == 0
    assert len(adapted) == len(model.architecture.layers) - trunk
    model.save_pretrained(tmp_path / "run")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run/actor").eval()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" in name)
    weights = torch.linspace(-1, 1, IDS.numel() * model.architecture.config.vocab_size).view(*IDS.shape, -1)
    found, states = {}, {}
    for recomputing in (False, True):
        model.enable_checkpointing(recomputing)
        model.zero_grad()
        for role in ("critic", "actor"):  # one after the other on the same experts
            with model.role(role):
                logits = model.architecture.output_embeddings(model.hidden_states(IDS))
                (logits * weights).sum().backward()
                states[role] = logits.detach()
        grads = {n: p.grad for n, p in model.base.named_parameters() if ".actor." in n}
        found[recomputing] = {name.replace(".actor.", "."): grad for name, grad in grads.items()}
    expected = plain(IDS).logits
    torch.testing.assert_close(states["actor"], expected.detach(), rtol=0, atol=1e-5)
    assert not torch.allclose(states["actor"], states["critic"])
    (expected * weights).sum().backward()
    wanted = {name.replace(".default.", "."): p.grad for name, p in plain.named_parameters() if "lora_" in name}
    assert wanted.keys() == found[True].keys()
    for grads in found.values():
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)
    export_role(tmp_path / "run", tmp_path / "out")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(merged, expected.detach(), rtol=0, atol=1e-4)


def test_what_was_chosen_and_what_could_be_is_said(caplog):
    def mixtral():
        return AutoModelForCausalLM.from_config(tiny_config("mixtral"))

    with caplog.at_level(logging.INFO, "hydra_ppo"):
        HydraModel(mixtral())
    (said,) = [record.getMessage() for record in caplog.records if "adapters sit on" in record.getMessage()]
    assert "adapters sit on k_proj, o_proj, q_proj, v_proj; the experts are no linear layers here" in said
    assert "puts adapters on them too (mlp.experts.down_proj, mlp.experts.gate_up_proj)" in said
    with pytest.raises(ConfigError, match=r"lora\.target_parameters='experts\.gone' is no parameter of experts; choose among"):
        HydraModel(mixtral(), lora=LoraSettings(target_parameters=["experts.gone"]))
    dense = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match="this model has none, leave it out"):
        HydraModel(dense, lora=LoraConfig(target_parameters=["experts.down_proj"]))
