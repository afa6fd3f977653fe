"""The shipped shapes have the parameters that their models are known to have."""

from __future__ import annotations

import json

import pytest
import torch

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.subjects.fake import meta_model
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES, SHAPES, model_config

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_248_023_552,
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
