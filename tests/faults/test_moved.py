"""Runs that were moved, alone or with all that they read, and what they stand on that changed meanwhile."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hydra_ppo.cli.flags import load_config, parse
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, sft_settings, write

JUDGE = {"kind": "classifier", "target": "judge"}


def write_judge(folder, base):
    """A sequence classifier with the tokenizer of a base."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from tests.training import llama

    torch.manual_seed(7)
    config = llama(num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for path in base.glob("token*"):
        shutil.copy(path, folder / path.name)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder `home` with a base, data, a judge, an sft run, and a ppo run on it of 2 steps, all named from inside it."""
    home = make_project(tmp_path_factory.mktemp("moved") / "home")
    write_judge(home / "judge", home / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        from pathlib import Path

        assert main(["sft", write(home / "sft.yaml", sft_settings(Path(), "sft", epochs=1))]) == 0
        settings = settings_here()
        for output, steps in (("whole", 3), ("run", 2)):
            settings["run"]["output"], settings["steps"] = f"runs/{output}", steps
            assert main(["ppo", write(home / "ppo.yaml", settings)]) == 0
    return home


def settings_here():
    from pathlib import Path

    settings = ppo_settings(Path(), "runs/run", steps=2, reward={"sources": [JUDGE]}, eval_every=0)
    settings["model"]["name_or_path"] = "sft"
    return settings


@pytest.fixture
def home(project, tmp_path, monkeypatch):
    """A copy of all of it at another place, with a working directory at a third."""
    shutil.copytree(project, tmp_path / "other" / "place")
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    return tmp_path / "other" / "place"


def go_on(run, *more):
    return main(["ppo", str(run / "config.yaml"), "--resume", "--steps", "3", "--eval_every", "0", *more])


def test_moved_with_all_that_it_reads(project, home, fault):
    shutil.move(project, project.parent / "hidden")
    try:
        assert go_on(home / "runs/run") == 0
    finally:
        shutil.move(project.parent / "hidden", project)
    assert_same(home / "runs/run", home / "runs/whole", without=("eval",))
    fault("a run moved with model, judge and data, resumed by its config.yaml from elsewhere", "went on", "same bits")


def test_moved_alone(home, tmp_path, capsys, fault):
    shutil.move(home / "runs/run", tmp_path / "alone")
    assert go_on(tmp_path / "alone") == 2
    assert "model.name_or_path=" in capsys.readouterr().err
    source = json.dumps([JUDGE | {"target": str(home / "judge")}])
    there = ["--model.name_or_path", str(home / "sft"), "--data.train", str(home / "pairs.jsonl"), "--reward.sources", source]
    assert go_on(tmp_path / "alone", *there) == 0
    assert_same(tmp_path / "alone", home / "runs/whole", without=("eval",))
    assert not (home / "runs/run").exists()
    fault("a run moved away from what it reads", "refused; went on where flags said where that lies", "same bits")


def test_of_an_older_config_is_never_begun_at_the_old_place(home, capsys):
    path = home / "runs/run/config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["paths_are_relative_to"]
    values["run"]["output"] = str(home / "runs/before")
    path.write_text(yaml.safe_dump(values))
    assert go_on(home / "runs/run") == 2
    assert "was before it was moved; pass --run.output" in capsys.readouterr().err
    assert not (home / "runs/before").exists()


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def scale(path):
    tensors = load_file(path)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path, {"format": "pt"})


CHANGES = {
    "end tokens": ("base/generation_config.json", ('"eos_token_id": 2', '"eos_token_id": 3'), "base generation_config.json"),
    "lora_alpha": ("sft/sft/adapter_config.json", ('"lora_alpha": 32', '"lora_alpha": 8'), "model sft/adapter_config.json"),
    "decoder": ("sft/tokenizer.json", ('"decoder": null', '"decoder": {"type": "Fuse"}'), "tokenizer"),
    "judge": ("judge/model.safetensors", None, "reward.sources[0] model.safetensors"),
    "head": ("sft/heads.safetensors", None, "model heads.safetensors"),
}


@pytest.mark.parametrize("name", quick_first(CHANGES, 2))
def test_what_it_stands_on_has_changed(name, home, capsys, monkeypatch, fault):
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    path, words, named = CHANGES[name]
    if words is None:
        scale(home / path)
    else:
        change(home / path, *words)
    assert go_on(home / "runs/run") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot go on from step-000002: " in line
    assert named in line
    assert "changed" in line
    fault(f"{name} changed before --resume", "refused before the model was loaded", "nothing was written")


def test_another_library_or_number_of_threads_is_said(home, monkeypatch, capsys):
    monkeypatch.setattr("hydra_ppo.cli.resume.version", lambda package: "0.0.1" if package == "peft" else "1")
    assert go_on(home / "runs/run") == 0
    err = capsys.readouterr().err
    assert "peft was " in err
    assert "is 0.0.1" in err
    assert "since step-000002: the rest may differ in the last bits" in err


def test_a_reward_function_that_has_changed_is_said(project, tmp_path, monkeypatch, capsys):
    """It runs in a process of its own, and this one never imports it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_judge.py").write_text("def judge(responses):\n    return [float(len(text)) for text in responses]\n")
    sources = [{"kind": "function", "target": "own_judge:judge"}]
    settings = ppo_settings(project, "x", steps=1, eval_every=0, reward={"sources": sources})
    settings["run"]["output"] = str(tmp_path / "run")
    assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 0
    (tmp_path / "own_judge.py").write_text("def judge(responses):\n    return [1.0 * len(text) for text in responses]\n")
    assert main(["ppo", write(tmp_path / "a.yaml", settings), "--resume", "--steps", "2"]) == 0
    assert "the module of the reward function own_judge:judge has changed since step-000001" in capsys.readouterr().err


def test_a_run_writes_paths_from_where_it_lies(home, tmp_path, capsys):
    written = yaml.safe_load((home / "runs/run/config.yaml").read_text())
    assert next(iter(written)) == "paths_are_relative_to"
    assert written["run"]["output"] == "."
    assert (written["model"]["name_or_path"], written["data"]["train"]) == ("../../sft", "../../pairs.jsonl")
    assert written["reward"]["sources"][0]["target"] == "../../judge"
    found = load_config(PPOConfig, home / "runs/run/config.yaml")
    assert (found.run.output, found.model.name_or_path) == (str(home / "runs/run"), str(home / "sft"))
    assert main(["ppo", str(home / "runs/run/config.yaml"), "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert "paths_are_relative_to" not in shown
    assert (shown["run"]["output"], shown["data"]["train"]) == (str(home / "runs/run"), str(home / "pairs.jsonl"))
    written["paths_are_relative_to"] = "the moon"
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match="paths_are_relative_to='the moon' is not 'this file'"):
        load_config(PPOConfig, tmp_path / "odd.yaml")


def test_a_leading_tilde_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    judge = "[{kind: classifier, target: ~/judge}]"
    flags = {"model.name_or_path": "~/m", "model.adapter": "~/a", "data.train": "~/t", "data.eval": "~/e", "run.output": "~/o"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    config = parse(PPOConfig, "ppo", [*words, "--reward.sources", judge]).config
    found = [config.model.name_or_path, config.model.adapter, config.data.train, config.data.eval, config.run.output]
    assert found == [str(tmp_path / name) for name in "mateo"]
    assert config.reward.sources[0].target == str(tmp_path / "judge")
