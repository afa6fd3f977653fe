"""What somebody may do to a model that stands, and which adapters it takes."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hydra_ppo.errors import ConfigError, RoleError
from hydra_ppo.model.hydra import HydraModel
from tests.families import FAMILIES, randomise, sequences
from tests.training import llama


def test_another_thread_is_refused_while_a_role_is_in_force():
    model, seen = HydraModel.from_config(llama()), []

    def enter():
        try:
            with model.role("critic"):
                seen.append(model.current_role)
        except RoleError as error:
            seen.append(str(error))

    def in_a_thread():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return seen.pop()

    with model.role("actor"):
        assert "role='critic' was asked for while another thread has the one base in role 'actor'" in in_a_thread()
        assert model.adapters.active == "actor"
    assert in_a_thread() == "critic"  # free again
    with model.role("actor"), model.role("critic"):
        pass
    assert in_a_thread() == "critic"


def test_layers_can_be_compiled_and_the_whole_says_what_instead():
    model, plain = HydraModel.from_config(llama()), HydraModel.from_config(llama())
    for one in (model, plain):
        randomise(one, seed=1)
    plain.load_state_dict(model.state_dict())
    with pytest.raises(RoleError, match=r"compile its layers: for layer in model\.architecture\.layers: layer\.compile\(\)"):
        model.compile()
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(RoleError, match=r"call logprobs, values, rewards or hidden_states inside"), model.role("actor"):
        torch.compile(model, backend="eager")(ids)
    for layer in model.architecture.layers:
        layer.compile(backend="eager")
    states = {}
    for role in (*model.roles, *model.roles):  # back again too
        with torch.no_grad(), plain.role(role), model.role(role):
            states[role] = model.hidden_states(ids)
            assert torch.equal(states[role], plain.hidden_states(ids))
    assert not torch.equal(states["actor"], states["critic"])


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_other_types_are_refused(cast):
    model = HydraModel.from_config(llama())
    with pytest.raises(RoleError, match=r"would round adapters and heads, which train in fp32; choose model.dtype"):
        cast(model)
    assert model.to("cpu") is model


def test_a_merged_adapter_is_refused():
    model = HydraModel.from_config(llama())
    model.base.merge_adapter(["actor"])
    with pytest.raises(RoleError, match="adapter 'actor' is merged into the base, which all roles share"), model.role("actor"):
        pass
    model.base.unmerge_adapter()
    with model.role("actor"):
        assert model.adapters.active == "actor"


def test_a_base_with_adapters_is_refused():
    base = AutoModelForCausalLM.from_config(llama())
    peft = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    for carrying in (peft, base):
        with pytest.raises(ConfigError, match="carries adapters already, which no role could switch off; hand over the plain"):
            HydraModel(carrying)
    assert HydraModel(peft.unload())


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "torch.save"])
def test_copies(trip, tmp_path):
    model = HydraModel.from_config(FAMILIES["llama"], trunk_layers=1)
    randomise(model)
    if trip == "deepcopy":
        copied = copy.deepcopy(model)
    elif trip == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    with model.role("actor"), copied.role("actor"):
        expected, found = (one.logprobs(sequences()).logprobs for one in (model, copied))
        assert torch.equal(found, expected)
    with torch.no_grad():
        for parameter in copied.role_parameters("actor").values():
            parameter.zero_()
    with model.role("actor"):
        assert torch.equal(model.logprobs(sequences()).logprobs, expected)  # the copy is one
    copied.train()
    copied.enable_checkpointing()
    with copied.role("actor"):
        copied.logprobs(sequences()).logprobs.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_options_that_our_pass_does_not_compute_are_refused():
    for name, value in (("lora_bias", True), ("use_qalora", True)):
        with pytest.raises(ConfigError, match=f"lora.{name}=True is not computed here, and would be left out silently"):
            HydraModel.from_config(llama(), lora=LoraConfig(**{name: value}))


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("all-linear", 7),
        (["q_proj", "v_proj"], 2),
        ([f"layers.{i}.self_attn.q_proj" for i in range(2)], 1),
        (r".*\.self_attn\.(q|k)_proj", 2),
    ],
)
def test_targets_mean_what_they_mean_in_peft(targets, wanted):
    ours = HydraModel.from_config(llama(), lora=LoraConfig(target_modules=targets))
    theirs = get_peft_model(AutoModelForCausalLM.from_config(llama()), LoraConfig(target_modules=targets))
    adapted = {name.replace(".default", "").replace(".actor", "") for name, _ in theirs.named_parameters() if "lora_A" in name}
    found = {name.replace(".actor", "") for name, _ in ours.base.named_parameters() if "lora_A" in name and ".actor." in name}
    assert found == adapted
    assert len(found) == 2 * wanted
