"""A finished run stays as it is, bit for bit, whatever is asked of it; only `--run.overwrite` replaces it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal

import pytest

from hydra_ppo.cli.main import main
from tests.faults.project import make_project, ppo_settings, quick_first, sft_settings, write
from tests.faults.test_killed import go

SAMPLES = ["--max-new-tokens", "3", "--temperature", "0"]
ASKED = {
    "begin again": [["{command}", "{config}"]],
    "--resume": [["{command}", "{config}", "--resume"], ["{command}", "{run}/config.yaml", "--resume"]],
    "--resume --dry-run": [["{command}", "{run}/config.yaml", "--resume", "--dry-run"], ["{command}", "{config}", "--dry-run"]],
    "the other command": [["{other}", "{run}/config.yaml", "--resume"], ["{other}", "{run}/config.yaml"]],
    "fewer steps": [["{command}", "{run}/config.yaml", "--resume", "--{length}", "1"]],
    "other settings": [["{command}", "{run}/config.yaml", "--resume", "--run.seed", "7"]],
    "--print-config": [["{command}", "{run}/config.yaml", "--print-config"]],
    "inspect": [["inspect", "{run}"], ["inspect", "{run}", "--json"]],
    "doctor": [["doctor", "--model", "{run}"]],
    "export": [
        ["export", "{run}", "--output", "{out}/a"],
        ["export", "{run}", "--output", "{out}/b", "--adapter-only"],
        ["export", "{run}", "--output", "{out}/c", "--role", "reward"],
        ["export", "{run}", "--output", "{run}"],
        ["export", "{run}", "--output", "{run}/plots"],
    ],
    "score": [["score", "{run}", "{data}", "--output", f"{{{place}}}/metrics.jsonl"] for place in ("out", "run")],
    "generate": [
        ["generate", "{run}", "--prompt", "w1 w2", "--role", "reference", *SAMPLES],
        ["generate", "{run}", "--prompts", "{data}", "--role", "base", "--output", "{run}/metrics.jsonl", *SAMPLES],
    ],
    "a run that starts from it": [
        ["ppo", "{next}"],
        ["sft", "{run}/config.yaml", "--run.output", "{out}/next", "--max_steps", "1"],
    ],
    "profile": [["profile", "{run}", "--simulate", "--prompt-tokens", "4", "--max-new-tokens", "4", "--batch-size", "2"]],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    assert main(["sft", write(folder / "sft.yaml", sft_settings(folder, "sft", epochs=1))]) == 0
    settings = ppo_settings(folder, "ppo", steps=2, eval_every=0, model={"name_or_path": str(folder / "sft")})
    assert main(["ppo", write(folder / "ppo.yaml", settings)]) == 0
    return folder


def content(run):
    """What lies in a run: names, and digests of files; the lock, which is taken and given back, is empty."""
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.name != ".lock"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" for name, path in files.items()}


@pytest.mark.parametrize("checkpoints", [True, False], ids=["with checkpoints", "without"])
@pytest.mark.parametrize("command", ["ppo", "sft"])
@pytest.mark.parametrize("name", quick_first(ASKED, 2))
def test_it_survives(name, command, checkpoints, project, tmp_path, monkeypatch, capsys, fault):
    home = shutil.copytree(project, tmp_path / "home")
    run, out = home / command, tmp_path / "out"
    out.mkdir()
    if not checkpoints:
        shutil.rmtree(run / "checkpoints")
    monkeypatch.chdir(tmp_path)
    following = ppo_settings(home, str(out / "ppo"), steps=1, eval_every=0, model={"name_or_path": str(run)})
    words = {
        **{"command": command, "other": {"ppo": "sft", "sft": "ppo"}[command], "run": run, "out": out},
        **{"config": home / f"{command}.yaml", "data": home / "pairs.jsonl", "next": write(tmp_path / "next.yaml", following)},
        "length": {"ppo": "steps", "sft": "max_steps"}[command],
    }
    # The settings name the project, which is not this copy of it.
    text = (home / f"{command}.yaml").read_text().replace(str(project), str(home))
    (home / f"{command}.yaml").write_text(text)
    before = content(run)
    assert "metrics.jsonl" in before
    for line in ASKED[name]:
        code = main([word.format(**words) for word in line])
        said = capsys.readouterr().err
        assert code in (0, 2), said
        assert "Traceback" not in said
        assert content(run) == before, (line, said)
    fault(f"a finished {command} run{'' if checkpoints else ' without checkpoints'}: {name}", "left alone", "bit for bit")


def test_without_checkpoints_it_says_so(project, tmp_path, capsys):
    shutil.copytree(project / "ppo", tmp_path / "ppo")
    shutil.rmtree(tmp_path / "ppo/checkpoints")
    settings = ppo_settings(project, "ppo", steps=2)
    settings["run"]["output"] = str(tmp_path / "ppo")
    assert main(["ppo", write(tmp_path / "a.yaml", settings), "--resume"]) == 2
    assert "holds a finished run without a checkpoint to go on from, and is left as it is" in capsys.readouterr().err
    settings["run"]["overwrite"] = True
    settings["steps"] = 1
    assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 0  # asked for by name


def test_a_model_that_is_not_finished_is_named(project, tmp_path, capsys, fault):
    sft = shutil.copytree(project / "sft", project / "cut")
    state = json.loads((sft / "state.json").read_text())
    (sft / "state.json").write_text(json.dumps(state | {"state": "interrupted"}))
    settings = ppo_settings(project, "on-cut", steps=1, eval_every=0, model={"name_or_path": str(sft)})
    assert main(["ppo", write(tmp_path / "a.yaml", settings), "--dry-run"]) == 0
    assert "is a run that is not finished" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 0
    assert "is a run that is not finished (interrupted): taken is what it saved last" in capsys.readouterr().err
    (sft / "hydra.json").unlink()  # as where it died while it saved
    settings["run"]["output"] = str(tmp_path / "b")
    assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 2
    assert "holds neither config.json nor hydra.json" in capsys.readouterr().err
    shutil.rmtree(sft)
    fault("ppo on an sft run that was cut off", "said, or refused where its model is half saved", "-")


NO_ROOM = OSError(28, "No space left on device")
FULL = {
    "config.yaml": "hydra_ppo.runs.run.write_whole",
    "tokenizer_config.json": "hydra_ppo.data.tokenizer_files.save_tokenizer",
    "hydra.json": "hydra_ppo.cli.commands._model_to",
    "plots": "hydra_ppo.runs.plots._save",
}


@pytest.mark.parametrize("name", quick_first(FULL, 1))
def test_a_full_disk_names_the_file_and_what_is_safe(name, project, tmp_path, monkeypatch, capsys, fault):
    def full(*_, **__):
        raise NO_ROOM

    settings = ppo_settings(project, str(tmp_path / "run"), steps=1, eval_every=0)
    with monkeypatch.context() as patch:
        if name == "config.yaml":
            whole = __import__("hydra_ppo.runs.run", fromlist=["write_whole"]).write_whole
            patch.setattr(FULL[name], lambda path, text: full() if path.name == name else whole(path, text))
        else:
            patch.setattr(FULL[name], full)
        assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"run/{name} cannot be written (No space left on device); " in line
    late = name in ("hydra.json", "plots")
    assert ("checkpoints/step-000001 is intact" if late else "no checkpoint was written yet") in line
    assert main(["ppo", write(tmp_path / "a.yaml", settings), "--resume"]) == 0
    fault(f"a full disk while {name} is written", "named, with what is safe", "went on")


def test_names_that_look_like_something_else(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("-dash", "x[/y]"):
        settings = ppo_settings(project, name, steps=1, eval_every=0)
        settings["run"]["output"] = name
        assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 0
        said = capsys.readouterr().out
        typed = {"-dash": "./-dash", "x[/y]": "'x[/y]'"}[name]
        assert f"hydra-ppo inspect {typed} shows" in said
        assert main(["inspect", f"./{name}"]) == 0
        assert name in capsys.readouterr().out
    assert main(["inspect", "-dash"]) == 2
    assert "-dash is read as an option, for it begins with -; write ./-dash." in capsys.readouterr().err
    (tmp_path / "-a.yaml").write_text((tmp_path / "a.yaml").read_text())
    assert main(["ppo", "-a.yaml"]) == 2
    assert "-a.yaml is read as an option, for it begins with -; write ./-a.yaml." in capsys.readouterr().err


def test_a_kill_leaves_no_half_made_export(project, tmp_path):
    """The folder that an export is named for appears whole, or not; what a dead one left does not hinder the next."""
    (tmp_path / ".writing-out").mkdir()
    (tmp_path / ".writing-out/model.safetensors").write_bytes(b"half")
    log = tmp_path / "log"
    assert go(["export", str(project / "ppo"), "--output", str(tmp_path / "out")], log, after=0.05) in (0, -signal.SIGKILL)
    assert not (tmp_path / "out").exists() or (tmp_path / "out/model.safetensors").is_file()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main(["export", str(project / "ppo"), "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / ".writing-out").exists()
    assert os.listdir(tmp_path / "out")
