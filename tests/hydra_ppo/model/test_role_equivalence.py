"""Each role of the one base against a separate Hugging Face model of its own, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.compat import dtype_option, loads_quantised
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import base_from_config, quantize_linears
from tests.families import FAMILIES, experience, randomise

RELATIVE = 1e-5
"""Largest difference, relative to the largest element of the tensor compared."""

TEMPERATURE = 0.7


class Separate:
    """Four models that share nothing, each run the way Hugging Face code runs it: left padding, masks, full logits."""

    def __init__(self, base: torch.nn.Module, hydra: HydraModel) -> None:
        self.models = {}
        for role, spec in hydra.roles.items():
            model = copy.deepcopy(base)
            if spec.adapter is not None:
                shape = hydra.base.peft_config[spec.adapter]
                config = LoraConfig(
                    r=shape.r,
                    lora_alpha=shape.lora_alpha,
                    target_modules=set(shape.target_modules),
                    fan_in_fan_out=shape.fan_in_fan_out,
                )
                model = PeftModel(model, config)
                state = get_peft_model_state_dict(hydra.base, adapter_name=spec.adapter, save_embedding_layers=False)
                set_peft_model_state_dict(model, {k: v.clone() for k, v in state.items()})
            self.models[role] = model
        self.heads = copy.deepcopy(hydra.heads)

    def hidden_and_logits(self, role, batch):
        model = self.models[role]
        input_ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
        mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        seen = []
        handle = inner.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        logits = model(input_ids=input_ids, attention_mask=mask.long(), position_ids=positions).logits
        handle.remove()
        return seen[0], logits

    def logprobs(self, role, batch):
        _, logits = self.hidden_and_logits(role, batch)
        width = batch.prompt_ids.shape[1]
        log_p = torch.log_softmax(logits[:, width - 1 : -1].float() / TEMPERATURE, -1)
        return log_p.gather(2, batch.response_ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def values(self, role, head, batch):
        hidden, _ = self.hidden_and_logits(role, batch)
        return self.heads[head](hidden)[:, batch.prompt_ids.shape[1] - 1 : -1, 0]

    def scores(self, role, head, batch):
        hidden, _ = self.hidden_and_logits(role, batch)
        last = batch.prompt_ids.shape[1] + batch.response_mask.sum(1) - 1
        return self.heads[head](hidden)[torch.arange(len(last)), last, 0]


def assert_near(found, expected, what, relative=RELATIVE):
    scale = expected.abs().max().clamp(min=1e-8)
    difference = ((found - expected).abs().max() / scale).item()
    assert difference <= relative, f"{what}: relative difference {difference:.2e}"


def lora_gradients(model, adapter):
    return {
        name.split("base_model.model.")[-1].replace(f".{adapter}.", "."): p.grad
        for name, p in model.named_parameters()
        if "lora_" in name and f".{adapter}." in name
    }


def build(family: str, quantization: str | None) -> tuple[HydraModel, Separate]:
    torch.manual_seed(0)
    base = HydraModel.from_config(FAMILIES[family], train="base").causal_lm.requires_grad_(False)
    if quantization:
        quantize_linears(base, quantization, torch.float32)
    plain = copy.deepcopy(base).train()  # training mode: bitsandbytes does not repack, dropout is 0
    hydra = HydraModel(base)
    randomise(hydra)
    return hydra, Separate(plain, hydra)


def check_roles(hydra: HydraModel, separate: Separate, checkpointing: bool) -> None:
    batch = experience()
    mask = batch.response_mask
    sequences = batch.sequences()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))

    with torch.no_grad():
        ref_logprobs, scores = hydra.reference_and_reward(sequences, TEMPERATURE)
    assert_near(ref_logprobs[mask], separate.logprobs("reference", batch)[0][mask], "reference log-probs")
    assert_near(scores, separate.scores("reward", "reward", batch), "scores")

    hydra.train()
    hydra.enable_checkpointing(checkpointing)
    # Both forward passes first, then one backward: a recompute under the wrong adapter would show.
    with hydra.role("actor"):
        logprobs, entropy, _ = hydra.logprobs(sequences, TEMPERATURE, entropy_grad=True)
    with hydra.role("critic"):
        values = hydra.values(sequences)
    expected_logprobs, expected_entropy = separate.logprobs("actor", batch)
    expected_values = separate.values("critic", "value", batch)
    assert_near(logprobs[mask], expected_logprobs[mask], "actor log-probs")
    assert_near(entropy[mask], expected_entropy[mask], "actor entropy")
    assert_near(values[mask], expected_values[mask], "values")

    def loss(logprobs, entropy, values):
        return masked_mean(weights * logprobs + 0.1 * entropy + values**2, mask)

    loss(logprobs, entropy, values).backward()
    loss(expected_logprobs, expected_entropy, expected_values).backward()
    for role in ("actor", "critic"):
        found = lora_gradients(hydra.base, role)
        expected = lora_gradients(separate.models[role], "default")
        assert found.keys() == expected.keys()
        assert len(found) > 0
        for name, gradient in expected.items():
            assert_near(found[name], gradient, f"gradient of {role} {name}")
    assert_near(hydra.heads["value"].weight.grad, separate.heads["value"].weight.grad, "gradient of the value head")
    assert hydra.heads["reward"].weight.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_equal_separate_models(family, checkpointing):
    check_roles(*build(family, None), checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_roles_equal_separate_models_on_a_quantised_base(family, quantization, checkpointing):
    check_roles(*build(family, quantization), checkpointing)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_on_a_quantised_base_that_was_loaded_from_a_folder(quantization, tmp_path):
    """from_pretrained leaves models in evaluation mode, where bitsandbytes would repack weights and lose the gradient."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": config} if loads_quantised(torch.device("cpu")) else {}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **options, **dtype_option(torch.float32)).train()
    if not options:
        quantize_linears(plain, quantization, torch.float32)
    hydra = HydraModel.from_pretrained(tmp_path, quantization=quantization)
    randomise(hydra)
    check_roles(hydra, Separate(plain, hydra), checkpointing=False)


def test_a_base_that_was_repacked_already_is_refused(tmp_path):
    torch.manual_seed(0)
    base = base_from_config(FAMILIES["llama"], quantization="nf4", attention="auto", dtype="fp32", device="cpu")
    layer = next(module for module in base.modules() if type(module).__name__ == "Linear4bit")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match="was repacked by an evaluation pass"):
        HydraModel(base)
