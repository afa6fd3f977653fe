"""Saved adapters and heads: taken whole or refused, found from anywhere, and read on what they were trained on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.manifest import MANIFEST, read_manifest
from tests.families import experience, randomise
from tests.training import write_model

ADAPTER = "sft/adapter_model.safetensors"
HEADS = "heads.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A base, and an adapter of rank 4 with a reward head on it, unquantised and on nf4."""
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder / "base")
    for name, quantization in (("run", None), ("run-nf4", "nf4")):
        model = HydraModel.from_pretrained(folder / "base", train="sft", lora=LoraSettings(r=4), quantization=quantization)
        randomise(model)
        model.reward_head_trained = True
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to spoil."""
    for name in ("base", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path / "run"


def change(path: Path, made: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(made(load_file(path)), path, {"format": "pt"})


def set_rank(run: Path, rank: int) -> None:
    path = run / "sft/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": rank}))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a layer is missing": (
        lambda run: change(run / ADAPTER, lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}),
        r"lacks 14 tensors, .*layers\.1\..* the first, that its adapter_config\.json promises",
    ),
    "one tensor is missing": (
        lambda run: change(run / ADAPTER, lambda t: {k: v for k, v in t.items() if k != max(t)}),
        r"lacks 1 tensor, .*layers\.1\.self_attn\.v_proj\.lora_B\.weight the first",
    ),
    "a stranger": (
        lambda run: change(run / ADAPTER, lambda t: t | {f"{min(t)}.old": torch.zeros(1)}),
        r"does not fit this base \(1 tensor, .*\.old the first, of no layer that it adapts\)",
    ),
    "embeddings, which all roles would share": (
        lambda run: change(run / ADAPTER, lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.zeros(32, 64)}),
        r"does not fit this base \(1 tensor, .*embed_tokens\.weight the first",
    ),
    "another rank than the config says": (
        lambda run: set_rank(run, 8),
        r"does not fit this base \(.* is \[4, 64\], not \[8, 64\]\)",
    ),
    "no head": (lambda run: change(run / HEADS, lambda t: {"other": torch.zeros(1)}), r"lacks reward\.weight; save"),
    "a head of another width": (
        lambda run: change(run / HEADS, lambda t: {"reward.weight": torch.zeros(1, 48)}),
        "is for hidden size 48, the base has 64; use its own base",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_whole_is_refused(name, run):
    spoil, says = SPOILED[name]
    HydraModel.from_pretrained(run)
    spoil(run)
    with pytest.raises(ConfigError, match=says) as error:
        HydraModel.from_pretrained(run)
    assert "\n" not in str(error.value)
    assert str(run) in str(error.value)


def logprobs(model: torch.nn.Module) -> Tensor:
    sequences = experience().sequences()
    with torch.no_grad():
        return model(input_ids=sequences.input_ids % 32).logits.log_softmax(-1)


def test_peft_finds_the_base_from_anywhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = HydraModel.from_pretrained("run", train="ppo")  # a relative path, as people type it
    model.save_pretrained("again")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with model.role("actor"):
        expected = logprobs(model.causal_lm)
    for adapter in ("actor", "sft"):
        config = json.loads((tmp_path / "again" / adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        torch.testing.assert_close(logprobs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again" / adapter)), expected)


def test_run_and_base_can_be_moved_together(run, tmp_path, monkeypatch):
    assert read_manifest(run)["base"]["name_or_path"] == "../base"
    (tmp_path / "moved").mkdir()
    for name in ("base", "run"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    monkeypatch.chdir("/")
    moved = HydraModel.from_pretrained(tmp_path / "moved/run", train="sft")
    moved.save_pretrained(tmp_path / "moved/run")  # which names the base where it is now
    config = json.loads((tmp_path / "moved/run/sft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved/base")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (LoraSettings(), None),
        (LoraSettings(r=8), "model.lora is for new adapters, and 'sft' is a saved one: not used are r=8 (it has 4)"),
        (LoraSettings(r=4, alpha=8), "not used are alpha=8 (it has 32)"),
        (LoraSettings(r=4, target_modules=["q_proj"]), "target_modules=['q_proj'] (it has ['down_proj', "),
    ],
)
def test_settings_that_a_saved_adapter_leaves_unused_are_named(asked, says, run, caplog):
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        HydraModel.from_pretrained(run, lora=asked)
    lines = [record.getMessage() for record in caplog.records if "model.lora" in record.getMessage()]
    assert [says in line for line in lines] == [True] * (says is not None)


@pytest.mark.parametrize(
    ("name", "read", "says"),
    [
        (
            "run-nf4",
            None,
            "in nf4, computing in fp32, read on an unquantised base in fp32: adapter sft, reward head;",
        ),
        ("run-nf4", "int8", "trained on a base in nf4, computing in fp32, read on a base in int8"),
        ("run", "nf4", "trained on an unquantised base in fp32, read on a base in nf4"),
        ("run-nf4", "nf4", None),
        ("run", None, None),
    ],
)
def test_another_quantisation_than_in_training_is_said(name, read, says, trained, caplog):
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        HydraModel.from_pretrained(trained / name, quantization=read)
    lines = [record.getMessage() for record in caplog.records if record.name == "hydra_ppo"]
    assert [says is not None and says in line for line in lines] == [True] * (says is not None)
    assert all("model.quantization=" in line for line in lines)


def test_the_manifest_names_the_quantisation_and_may_not(trained, run, caplog):
    assert read_manifest(trained / "run-nf4")["quantization"] == "nf4"
    assert read_manifest(run)["quantization"] is None
    manifest = json.loads((run / MANIFEST).read_text())
    del manifest["quantization"]  # saved before it was written down: nothing is known, nothing is said
    (run / MANIFEST).write_text(json.dumps(manifest))
    HydraModel.from_pretrained(run, quantization="nf4")
    assert "trained on" not in caplog.text
