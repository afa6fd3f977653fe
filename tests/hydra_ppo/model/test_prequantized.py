"""A folder that is stored quantised is the model that was quantised, in whatever it computes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from hydra_ppo import compat
from hydra_ppo.errors import ConfigError
from hydra_ppo.model import prequantized
from hydra_ppo.model.for_others import save_for_others
from hydra_ppo.model.loading import load_base
from tests.families import COMMON, FAMILIES
from tests.held import differences, held
from tests.hydra_ppo.model.test_whole import BASE
from tests.training import llama

KINDS = {**FAMILIES, "mixtral": MixtralConfig(**COMMON, num_local_experts=4)}


def stored(place, config, quantization, dtype=torch.bfloat16, name="bf16"):
    torch.manual_seed(0)
    # Of a copy: transformers writes the type into the config, which other tests build from, too.
    AutoModelForCausalLM.from_config(deepcopy(config), **compat.dtype_option(dtype)).save_pretrained(place / "base")
    base = load_base(str(place / "base"), **BASE | {"quantization": quantization, "dtype": name})
    save_for_others(base, place / "stored")
    return str(place / "base"), str(place / "stored")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", KINDS)
def test_every_family_comes_back_to_the_last_bit(family, quantization, tmp_path):
    base, folder = stored(tmp_path, KINDS[family], quantization)
    for dtype in ("bf16", "fp32"):  # as it was written, and as `auto` is on a CPU
        before = load_base(base, **BASE | {"quantization": quantization, "dtype": dtype})
        assert differences(before, load_base(folder, **BASE | {"dtype": dtype})) == []


def test_differences_are_seen(tmp_path):
    base, folder = stored(tmp_path, llama(), "nf4")
    one, other = (load_base(name, **BASE | {"quantization": "nf4", "dtype": "bf16"}) for name in (base, folder))
    other.model.layers[1].self_attn.q_proj.weight.quant_state.absmax[0] += 1
    assert {name.rsplit(".", 2)[0] for name in differences(one, other)} == {"model.layers.1.self_attn.q_proj"}
    assert differences(one, load_base(base, **BASE | {"dtype": "bf16"})) != []


def test_what_a_family_keeps_in_fp32_stays_there(tmp_path):
    _, folder = stored(tmp_path, llama(), "nf4", torch.float32, "fp32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model._keep_in_fp32_modules = ["norm"]
    prequantized.compute_in(model, torch.bfloat16, torch.float32)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.bfloat16


def test_another_compute_type_and_another_quantization_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "hydra_ppo")
    _, folder = stored(tmp_path, llama(), "nf4")
    load_base(folder, **BASE | {"quantization": "nf4", "dtype": "bf16"})
    assert "quantised" not in caplog.text
    assert "model.quantization" not in caplog.text
    load_base(folder, **BASE | {"quantization": "int8", "dtype": "fp32"})
    first, second = (line for line in caplog.messages if folder in line)
    assert first.startswith("model.quantization=int8 is not how ")
    assert "its weights are nf4 and stay so" in first
    assert second.endswith("was quantised in bfloat16 and computes in float32 here, as model.dtype says")


def test_a_version_that_cannot_read_it_on_a_cpu_is_named(tmp_path, monkeypatch):
    _, folder = stored(tmp_path, llama(), "int8")
    monkeypatch.setattr(prequantized, "loads_quantised", lambda place: False)
    with pytest.raises(ConfigError, match=r"is stored as int8, which transformers==.* cannot read on a CPU; update it"):
        load_base(folder, **BASE)


def test_statistics_are_among_what_is_compared(tmp_path):
    _, folder = stored(tmp_path, llama(), "nf4")
    names = held(load_base(folder, **BASE))
    for part in ("state.absmax", "state.code", "state2.absmax", "state.offset", "compute_dtype"):
        assert f"model.layers.0.mlp.up_proj.{part}" in names
