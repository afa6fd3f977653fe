"""A LoRA adapter that PEFT wrote, without this package, as the policy that training starts from."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from tests.families import FAMILIES, PROMPTS, RESPONSES, sequences

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return base and adapter, the adapter as a trainer of elsewhere leaves it: dropout on, its own rank and targets."""
    root = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    base.save_pretrained(root / "base")
    peft = get_peft_model(
        base, LoraConfig(r=5, lora_alpha=13, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    peft.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def theirs(base, adapter, batch):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, batch.input_ids[:, 1:, None])[..., 0]


def test_it_is_the_reference_and_what_actor_and_critic_start_from(folders, tmp_path):
    base, adapter = folders
    model = HydraModel.from_pretrained(base, adapter=adapter)
    batch = sequences()
    expected = theirs(base, adapter, batch)
    with torch.no_grad():
        reference, _ = model.reference_and_reward(batch)
        with model.role("actor"):
            actor = model.logprobs(batch).logprobs
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        wanted = expected[row, len(prompt) - 1 :][: len(response)]
        torch.testing.assert_close(reference[row, : len(response)], wanted, rtol=0, atol=1e-5)
    assert torch.equal(actor, reference)
    assert model.base.peft_config["actor"].r == 5
    model.save_pretrained(tmp_path / "saved")
    again = HydraModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.reference_and_reward(batch)[0], reference)
    assert json.loads((tmp_path / "saved" / "sft" / "adapter_config.json").read_text())["lora_dropout"] == 0


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_joint_sft_goes_on_from_it(folders, stage):
    base, adapter = folders
    model = HydraModel.from_pretrained(base, adapter=adapter, train=stage)
    with torch.no_grad():
        found, _ = model.reference_and_reward(sequences())
    expected, _ = HydraModel.from_pretrained(base, adapter=adapter).reference_and_reward(sequences())
    assert torch.equal(found, expected.detach())
    assert set(model.base.peft_config) == ({"sft"} if stage == "sft" else {"sft", "reward"})


def broken(folders, tmp_path, **changes):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in folders[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True rounds"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* would train a copy of base layers"),
        ({"lora_bias": True}, "lora_bias=True is not computed here"),
        ({"r": 6}, "does not fit this base"),
        ({"target_modules": ["q_proj"]}, "of no layer that it adapts"),
        ({"peft_type": "IA3"}, "of kind .*; only LoRA adapters"),
    ],
)
def test_what_cannot_be_taken(folders, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        HydraModel.from_pretrained(folders[0], adapter=broken(folders, tmp_path, **changes))


def test_where_it_does_not_go(folders, tmp_path):
    base, adapter = folders
    with pytest.raises(ConfigError, match=r"model.trunk_layers=1: the adapter of model.adapter sits on those layers too"):
        HydraModel.from_pretrained(base, adapter=adapter, trunk_layers=1)
    with pytest.raises(ConfigError, match=r"model.adapter='nowhere' holds no adapter_config.json"):
        HydraModel.from_pretrained(base, adapter="nowhere")
    with pytest.raises(ConfigError, match=r"is an adapter; name its base there, and this folder in model.adapter"):
        HydraModel.from_pretrained(adapter)
    HydraModel.from_pretrained(base).save_pretrained(tmp_path / "run")
    with pytest.raises(ConfigError, match="does not go with a run of this program"):
        HydraModel.from_pretrained(tmp_path / "run", adapter=adapter)
