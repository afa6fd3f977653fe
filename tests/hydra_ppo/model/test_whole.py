"""A model is taken whole, or refused in one line: before its weights are read, and when they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaModel, MixtralConfig

from hydra_ppo.errors import ConfigError
from hydra_ppo.model import whole
from hydra_ppo.model.loading import load_base, quantization_of
from hydra_ppo.model.whole import skeleton
from tests.families import COMMON, FAMILIES
from tests.training import llama

WEIGHTS = "model.safetensors"
BASE = {"quantization": None, "attention": "sdpa", "dtype": "fp32", "device": "cpu", "trust_remote_code": False}
MIXTRAL = MixtralConfig(**COMMON, num_local_experts=4)

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def save(folder: Path, config, change: Change | None = None) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if change is not None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def without(*parts: str) -> Change:
    """Drop the tensors whose names hold all of these."""
    return lambda tensors: {k: v for k, v in tensors.items() if not all(part in k for part in parts)}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {k.replace(old, new, 1): v for k, v in tensors.items()}


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v[:, :32].contiguous() if "q_proj" in k else v for k, v in tensors.items()}


UNTIED, TIED = llama(tie_word_embeddings=False), llama(tie_word_embeddings=True)
BROKEN = {
    "no head": (UNTIED, without("lm_head"), r"lacks weight lm_head\.weight of the model"),
    "a layer": (UNTIED, without(".layers.1."), r"lacks 9 weights \(model\.layers\.1\.input_layernorm\.weight the first\)"),
    "one tensor": (UNTIED, without("layers.0", "up_proj"), r"lacks weight model\.layers\.0\.mlp\.up_proj\.weight"),
    "another prefix": (
        UNTIED,
        lambda tensors: {f"base_model.model.{k}": v for k, v in tensors.items()},
        r"lacks 21 weights .*it holds 21 weights \(base_model\.model\.lm_head\.weight the first\) that the model does not know",
    ),
    "embeddings that the head is tied to": (TIED, without("embed_tokens"), r"lacks .*weights? .*(embed_tokens|lm_head)"),
    "another shape": (UNTIED, narrow, r"holds 2 weights .*\.layers\.0\.self_attn\.q_proj\.weight: \[64, 32\], not \[64, 64\]"),
    "an expert": (MIXTRAL, without("layers.1", "experts.2."), "(holds .*another shape|lacks)"),
    "all experts of a layer": (MIXTRAL, without("layers.1", ".experts."), "lacks .*experts"),
    "a tensor of an expert": (MIXTRAL, without("layers.1", "experts.2.w1"), "(lacks|holds only parts of some weights)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_files_lack_is_refused_by_name(name, tmp_path):
    config, change, says = BROKEN[name]
    folder = str(save(tmp_path / "base", config, change))
    with pytest.raises(ConfigError, match=rf"^model\.name_or_path='.*base' {says}") as error:
        load_base(folder, **BASE)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError) as before:
        skeleton(folder)
    assert str(before.value) == str(error.value)


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral"])
def test_whole_files_of_every_family_pass(name, tmp_path, caplog):
    folder = str(save(tmp_path / "base", {**FAMILIES, "mixtral": MIXTRAL}[name]))
    empty = skeleton(folder)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    load_base(folder, **BASE)
    assert "not used" not in caplog.text


@pytest.mark.parametrize(
    "change", [renamed("model.embed_tokens", "lm_head"), renamed("model.", "")], ids=["stored as the head", "of the backbone"]
)
def test_tied_weights_and_known_prefixes_are_no_gap(change, tmp_path):
    folder = str(save(tmp_path / "base", TIED, change))
    skeleton(folder)
    whole_one = AutoModelForCausalLM.from_pretrained(save(tmp_path / "whole", TIED))
    found = load_base(folder, **BASE)
    for key, value in whole_one.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


def test_a_shard_that_lacks_a_tensor_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(UNTIED).save_pretrained(tmp_path, max_shard_size="80KB")
    index = json.loads((tmp_path / whole.INDEX).read_text())["weight_map"]
    skeleton(str(tmp_path))
    shard = tmp_path / index["model.norm.weight"]
    save_file(without("model.norm.weight")(load_file(shard)), shard, {"format": "pt"})
    for read in (skeleton, lambda folder: load_base(folder, **BASE)):
        with pytest.raises(ConfigError, match=r"lacks weight model\.norm\.weight"):
            read(str(tmp_path))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_is_quantised_while_it_loads_must_be_whole_too(quantization, tmp_path):
    options = BASE | {"quantization": quantization}
    assert quantization_of(load_base(str(save(tmp_path / "whole", TIED)), **options)) == quantization
    folder = save(tmp_path / "base", TIED, without("layers.1", "q_proj"))
    with pytest.raises(ConfigError, match=r"lacks weight model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_base(str(folder), **options)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_was_saved_quantised_must_be_whole_too(quantization, tmp_path):
    load_base(str(save(tmp_path / "plain", UNTIED)), **BASE | {"quantization": quantization}).save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    skeleton(folder)
    assert quantization_of(load_base(folder, **BASE)) == quantization
    stored = load_file(tmp_path / "base" / WEIGHTS)
    save_file(
        {k: v for k, v in stored.items() if not k.endswith("layers.1.self_attn.q_proj.weight")},
        tmp_path / "base" / WEIGHTS,
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"lacks weight model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_base(folder, **BASE)


def test_weights_that_nobody_reads_are_said(tmp_path, caplog):
    load_base(str(save(tmp_path / "base", UNTIED, lambda tensors: tensors | {"v_head.bias": torch.ones(1)})), **BASE)
    assert "weight v_head.bias of its files not used by LlamaForCausalLM" in caplog.text


def test_a_backbone_alone_is_no_causal_lm(tmp_path):
    LlamaModel(UNTIED).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks weight lm_head\.weight"):
        load_base(str(tmp_path), **BASE)
