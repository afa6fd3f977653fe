"""A dry run fails where the run would, over the model, in the same words, and neither reads a weight for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForSequenceClassification, OPTConfig

from hydra_ppo.cli import model_files
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import DataSettings, ModelSettings, RunSettings, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from tests.families import IDS
from tests.training import llama, tokenizer, write_model

FUNCTION = ["--reward.sources", "[{kind: function, target: 'tests.faults.light:noisy'}]"]
SHORT = ["--data.max_prompt_tokens", "16", "--rollout.max_new_tokens", "16"]
LONG = ["--data.max_prompt_tokens", "24", "--rollout.max_new_tokens", "41"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Bases of three kinds, 64 positions each, a model with a trained head, one without, and pairs."""
    folder = tmp_path_factory.mktemp("originals")
    write_model(folder / "base")
    sizes = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    opt = {"vocab_size": 32, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    others = {
        "gpt2": GPT2Config(**sizes, **IDS),
        "opt": OPTConfig(**opt, max_position_embeddings=64, word_embed_proj_dim=32, **IDS),
    }
    for name, config in others.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    for name, head in (("trained", True), ("headless", False)):
        model = HydraModel.from_pretrained(folder / "base", train="sft")
        model.reward_head_trained = head
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    LlamaForSequenceClassification(llama(num_labels=1)).save_pretrained(folder / "judge")
    tokenizer().save_pretrained(folder / "judge")
    rows = [{"prompt": f"w{i} w2", "chosen": " w3 w4", "rejected": " w5"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def place(originals, tmp_path, monkeypatch) -> Path:
    shutil.copytree(originals, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def both(capsys, monkeypatch, command: str, model: str, *flags: str) -> str:
    """Refused by the dry run and by the run alike: return the line."""
    found = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    for option in (["--dry-run"], []):
        capsys.readouterr()
        argv = [command, "--model.name_or_path", model, "--data.train", "pairs.jsonl", "--run.output", "out", *flags]
        assert main([*argv, *option]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        found.append(err.strip())
    assert found[0] == found[1]
    assert not Path("out").exists()
    return found[0]


def drop(path: str, part: str) -> None:
    save_file({k: v for k, v in load_file(path).items() if part not in k}, path, {"format": "pt"})


@pytest.mark.parametrize("model", ["gpt2", "opt"])
def test_rows_beyond_a_table_of_positions(model, place, capsys, monkeypatch):
    line = both(capsys, monkeypatch, "ppo", model, *FUNCTION, *LONG)
    assert line == (
        "data.max_prompt_tokens=24 and rollout.max_new_tokens=41 make rows of up to 65 tokens, the model's table has 64 "
        "positions; lower them by 1 in all."
    )
    line = both(capsys, monkeypatch, "sft", model)
    assert line.startswith("data.max_prompt_tokens=512 and data.max_response_tokens=512 make rows of up to 1024 tokens")


def test_rows_beyond_what_a_rotary_model_was_trained_for_get_a_line(place, capsys):
    base = ["ppo", "--model.name_or_path", "base", "--data.train", "pairs.jsonl", "--run.output", "out", *FUNCTION, "--dry-run"]
    assert main([*base, *LONG]) == 0
    assert "the model was trained for 64 positions" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main([*base, *SHORT]) == 0
    assert "positions" not in capsys.readouterr().out


def test_embeddings_whose_rows_cannot_be_cut_into_groups(place, capsys, monkeypatch):
    line = both(capsys, monkeypatch, "ppo", "gpt2", *FUNCTION, *SHORT, "--model.quantize_embeddings", "int8")
    assert line == (
        "model.quantize_embeddings='int8' needs embeddings and an output head whose width is a multiple of 64; GPT2LMHeadModel "
        "has 32: leave it at null."
    )


def test_weights_that_the_files_lack(place, capsys, monkeypatch):
    drop("base/model.safetensors", "lm_head")
    line = both(capsys, monkeypatch, "sft", "base")
    assert line.startswith("model.name_or_path='base' lacks weight lm_head.weight of the model")
    assert "lm_head.weight" in both(capsys, monkeypatch, "ppo", "base", *FUNCTION)


def test_an_adapter_that_lacks_tensors(place, capsys, monkeypatch):
    drop("trained/sft/adapter_model.safetensors", ".layers.1.")
    assert both(capsys, monkeypatch, "ppo", "trained").startswith("adapter 'trained/sft' lacks 14 tensors")


def test_a_head_for_another_base(place, capsys, monkeypatch):
    save_file({"reward.weight": torch.zeros(1, 48)}, "trained/heads.safetensors")
    assert "is for hidden size 48, the base has 64" in both(capsys, monkeypatch, "ppo", "trained")


@pytest.mark.parametrize("model", ["base", "headless"])
def test_the_reward_head_of_a_model_that_has_none(model, place, capsys, monkeypatch):
    assert "this model's was never trained; run hydra-ppo sft first" in both(capsys, monkeypatch, "ppo", model)


def test_another_base_than_the_adapters_were_trained_on(place, capsys, monkeypatch):
    tensors = load_file("base/model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, "base/model.safetensors", {"format": "pt"})
    assert "holds adapters of another base" in both(capsys, monkeypatch, "ppo", "trained")


def test_a_base_that_would_be_tuned_under_adapters(place, capsys, monkeypatch):
    line = both(capsys, monkeypatch, "sft", "trained", "--method", "full")
    assert line == "method='full' would change the base under trained adapters; start from a plain base."


def test_a_reward_model_trained_into_the_policy(place, capsys, monkeypatch):
    line = both(capsys, monkeypatch, "sft", "base", "--method", "full", "--sft_coef", "0")
    assert line.startswith("sft_coef=0 with method='full' would change the policy that PPO starts from; use method='lora'")


def test_a_reward_model_alone_is_announced(place, capsys):
    argv = ["sft", "--model.name_or_path", "base", "--data.train", "pairs.jsonl", "--run.output", "out", "--dry-run"]
    assert main([*argv, "--sft_coef", "0"]) == 0
    assert "adapter of its own, 'reward'" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_stages_of_reward_training():
    settings = (ModelSettings("m"), DataSettings("d"), RunSettings("o"))
    assert SFTConfig(*settings).stage == "sft"
    assert SFTConfig(*settings, reward_coef=0.0).stage == "sft"
    assert SFTConfig(*settings, sft_coef=0.0).stage == "reward"
    assert SFTConfig(*settings, sft_coef=0.0, adapter="reward").stage == "reward"
    assert SFTConfig(*settings, method="full").stage == "base"


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ("{kind: function, target: 'nowhere:f'}", "names no installed package 'nowhere'"),
        ("{kind: function, target: 'tests.faults.light:no_such'}", "cannot be imported (AttributeError"),
        ("{kind: function, target: 'broken:f'}", "cannot be imported (ZeroDivisionError"),
        ("{kind: classifier, target: gone/judge}", "names no such folder, nor a model in the hub's cache"),
        ("{kind: classifier, target: trained}", "is a run of this program, not a classifier"),
    ],
)
def test_a_reward_that_is_not_there(sources, says, place, capsys, monkeypatch):
    (place / "broken.py").write_text("1 / 0\n")
    assert says in both(capsys, monkeypatch, "ppo", "base", "--reward.sources", f"[{sources}]")


@pytest.mark.parametrize("name", ["runs/gone/sft", "a b", "./gone", "/gone", "gone/", "-gone", "a..b"])
def test_what_no_hub_could_have_is_no_folder_either(name, place, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    line = both(capsys, monkeypatch, "sft", name)
    assert line == f"model.name_or_path={name!r} names no such folder; check the path."


def test_the_hub_is_asked_once_and_briefly(place, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(timeout)
        if len(asked) > 1:
            raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model_files.check_reachable("m", "runs/gone")
    with pytest.raises(ConfigError, match=r"m='runs/gone' names no such folder, .* cannot be reached \(ConnectionError\)"):
        model_files.check_reachable("m", "runs/gone")
    assert asked == [model_files.SECONDS] * 2


def test_a_model_in_the_cache_needs_no_hub(place, monkeypatch):
    monkeypatch.setattr("hydra_ppo.model.fingerprint.model_folder", lambda name: Path("base"))
    model_files.check_reachable("m", "org/model")
    (place / "base/model.safetensors").unlink()  # its config alone is no model
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids to ask"):
        model_files.check_reachable("m", "org/model")


@pytest.mark.parametrize("value", ["[pairs.jsonl, more.jsonl]", "pairs.jsonl,more.jsonl"])
def test_several_files_where_one_is_taken(value, place, capsys, monkeypatch):
    line = both(capsys, monkeypatch, "sft", "base", "--data.train", value)
    assert line == f"{value}: no such file; check the path, or put the rows of several files into one."
    settings = "data: {train: [pairs.jsonl, more.jsonl]}\nrun: {output: out}\nmodel: {name_or_path: base}\n"
    (place / "run.yaml").write_text(settings)
    assert main(["sft", "run.yaml", "--dry-run"]) == 2
    line = capsys.readouterr().err.strip()
    assert line == "data.train=['pairs.jsonl', 'more.jsonl'] is a list, and takes one; put all rows into one file."
