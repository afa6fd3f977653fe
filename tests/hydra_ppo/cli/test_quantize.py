"""A base that is quantised once is the same model to this program and to transformers, and to a run that stands on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydra_ppo.cli.main import main
from hydra_ppo.cli.quantize import quantize_model
from hydra_ppo.compat import dtype_option, loads_quantised
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.loading import load_base, quantization_of
from tests.faults.project import make_project, ppo_settings, sft_settings, write
from tests.held import differences
from tests.hydra_ppo.model.test_whole import BASE
from tests.training import llama, tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

pytestmark = pytest.mark.skipif(not loads_quantised(torch.device("cpu")), reason="transformers reads it on a GPU alone")


def base(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(**changes), **dtype_option(dtype)).save_pretrained(folder)
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    settings = {"temperature": 0.6, "eos_token_id": [2, 3], "transformers_version": "4.46.0"}  # as old models have them
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    for module in model.modules():
        module.training = type(module).__module__.startswith("bitsandbytes")  # in evaluation mode they repack their weights
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp4"])
def test_it_is_the_model_that_was_quantised(quantization, tmp_path, monkeypatch, capsys):
    folder = base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "base", "--output", "out", "--quantization", quantization]) == 0
    assert (
        "Name it in model.name_or_path, or load it with AutoModelForCausalLM.from_pretrained('out')." in capsys.readouterr().out
    )
    before = load_base(str(folder), **BASE | {"quantization": quantization, "dtype": "bf16"})
    ours, plain = load_base("out", **BASE | {"dtype": "bf16"}), AutoModelForCausalLM.from_pretrained("out")
    assert quantization_of(ours) == quantization_of(plain) == quantization
    assert differences(before, ours) == []
    assert torch.equal(logits(ours), logits(before))
    assert torch.equal(logits(plain), logits(before))


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, "auto"), (torch.float32, "auto"), (torch.float32, "bf16")])
def test_the_type_is_the_stored_one_or_the_one_that_is_asked_for(stored, dtype, tmp_path):
    quantize_model(str(base(tmp_path / "base", stored)), tmp_path / "out", dtype=dtype)
    expected = torch.bfloat16 if dtype == "bf16" else stored
    assert {v.dtype for k, v in load_file(tmp_path / "out/model.safetensors").items() if "embed" in k} == {expected}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_tokenizer_template_and_generation_settings_come_along(tmp_path):
    folder = base(tmp_path / "base")
    quantize_model(str(folder), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == tokenizer().get_vocab()
    assert found.chat_template == TEMPLATE


def test_a_model_without_tokenizer_is_said_to_have_none(tmp_path):
    folder = base(tmp_path / "base")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert any("holds no tokenizer" in note for note in quantize_model(str(folder), tmp_path / "out"))


def test_twice_the_same_bytes(tmp_path):
    """So a run's base is known again, where it was quantised anew."""
    folder = base(tmp_path / "base")
    for name in ("one", "two"):
        quantize_model(str(folder), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_an_empty_folder_is_taken_and_nothing_is_left_beside_it(tmp_path):
    folder = base(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / ".writing-out").mkdir()  # of a process that died
    quantize_model(str(folder), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_it_needs_on_the_disk_is_known_before_a_weight_is_read(quantization, tied, tmp_path, monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 500, "tie_word_embeddings": tied}
    folder = base(tmp_path / "base", **sizes)
    said: list[str] = []
    quantize_model(str(folder), tmp_path / "out", quantization=quantization, tell=said.append)
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert f"become {size / 2**20:.1f}"[:-1] in said[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=size - 1))
    monkeypatch.setattr("hydra_ppo.model.loading.load_whole", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"output='.*other' needs \d+ MiB, and its disk has \d+ MiB free; make room, or"):
        quantize_model(str(folder), tmp_path / "other", quantization=quantization)
    assert not (tmp_path / "other").exists()


def test_progress_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_ppo.cli.quantize.EVERY", 0.0)
    said: list[str] = []
    quantize_model(str(base(tmp_path / "base")), tmp_path / "out", tell=said.append)
    assert said[1] == "1 of 21 weights"
    assert said[-1] == "21 of 21 weights"


def test_weights_that_no_linear_layer_holds_are_said(tmp_path):
    from tests.hydra_ppo.model.test_whole import MIXTRAL, save

    notes = quantize_model(str(save(tmp_path / "base", MIXTRAL)), tmp_path / "out")
    assert any("most of the weights are in no linear layer" in note for note in notes)


def adapters(run: Path) -> dict[str, torch.Tensor]:
    files = [*run.glob("*/adapter_model.safetensors"), run / "heads.safetensors"]
    return {f"{file.relative_to(run)} {k}": v for file in files for k, v in load_file(file).items()}


def go(command: str, settings: dict, *flags: str) -> None:
    path = write(Path(settings["run"]["output"]).with_suffix(".yaml"), settings)
    assert main([command, path, *flags]) == 0


def test_a_run_on_it_is_the_run_on_the_base_and_can_be_resumed_and_exported(tmp_path, capsys):
    """SFT, PPO, a second part of it, export: each gives the bits that the unquantised base with model.quantization gives."""
    project = make_project(tmp_path)
    assert main(["quantize", str(project / "base"), "--output", str(project / "held")]) == 0
    for name, model in {
        "plain": {"name_or_path": str(project / "base"), "quantization": "nf4"},
        "once": {"name_or_path": str(project / "held")},
    }.items():
        go("sft", sft_settings(project, f"{name}-sft", model=model, epochs=1))
        held = {key: value for key, value in model.items() if key == "quantization"}
        settings = ppo_settings(project, f"{name}-ppo", model={"name_or_path": str(project / f"{name}-sft")} | held, steps=1)
        go("ppo", settings)
        go("ppo", settings, "--resume", "--steps", "2")
    expected = adapters(project / "plain-ppo")
    found = adapters(project / "once-ppo")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "is not how" not in capsys.readouterr().err
    manifest = json.loads((project / "once-ppo/hydra.json").read_text())
    assert manifest["quantization"] == "nf4"
    assert manifest["base"]["name_or_path"] == "../held"
    assert main(["export", str(project / "once-ppo"), "--output", str(project / "out")]) == 0
    assert "the base is stored as nf4: written are the weights that it stands for, unpacked" in capsys.readouterr().out
    assert quantization_of(AutoModelForCausalLM.from_pretrained(project / "out")) is None
    again = project / "again"
    shutil.move(project / "held", again)  # quantised anew it is known; another base under its name is not
    quantize_model(str(project / "base"), project / "held")
    assert main(["export", str(project / "once-ppo"), "--output", str(project / "out-2"), "--adapter-only"]) == 0
    shutil.rmtree(project / "held")
    quantize_model(str(project / "base"), project / "held", quantization="int8")
    capsys.readouterr()
    assert main(["export", str(project / "once-ppo"), "--output", str(project / "out-3")]) == 2
    assert "holds adapters of another base than" in capsys.readouterr().err
