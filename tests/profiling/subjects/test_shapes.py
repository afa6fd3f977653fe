"""The shipped shapes have the parameters that their models are known to have."""

from __future__ import annotations

import json

import pytest
import torch

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.subjects.fake import meta_model
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES, SHAPES, model_config, shipped_name

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
    "gemma-3-4b": 4_300_079_472 - 419_816_304,  # without the vision tower
    "opt-1.3b": 1_315_758_080,
    "gpt2": 124_439_808,
}
"""As their model cards and checkpoints have it."""


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    model = meta_model(model_config(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_shape_has_a_home():
    assert HUB_NAMES.keys() == SHAPES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("GPT2", "gpt2"),
        ("mistralai/Mistral-7B-Instruct-v0.1", None),  # another vocabulary
        ("Qwen/Qwen2.5-Math-7B", None),
    ],
)
def test_hub_names_of_a_known_shape(name, shape):
    assert shipped_name(name) == shape


def test_a_folder_and_a_config_file_will_do(tmp_path):
    config = model_config("gpt2")
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert model_config(str(name)).n_layer == 12


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"model_type": "no-such-family"})])
def test_what_is_no_config_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a model's config"):
        model_config(str(tmp_path))


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises(ConfigError, match=r"model='llama-9' is no shipped name.*llama-3.1-8b"):
        model_config("llama-9")
