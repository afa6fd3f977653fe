"""Checkpoints that are damaged though their checksums are right, as where somebody edits one: the one before is used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_ppo.cli.main import main
from hydra_ppo.runs.checkpoint import MANIFEST, _digest, _files, _seal
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, write

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    assert main(["ppo", write(folder / "whole.yaml", settings(folder, "whole"))]) == 0
    return folder


def settings(folder, output):
    return ppo_settings(folder, output, steps=4, run={"save_every": 2}, eval_every=0)


@pytest.fixture
def newest(project, tmp_path):
    """The newest checkpoint of a copy of the run, as if it had been killed after it."""
    shutil.copytree(project / "whole", tmp_path / "run")
    state = json.loads((tmp_path / "run/state.json").read_text())
    (tmp_path / "run/state.json").write_text(json.dumps(state | {"state": "running", "finished": None}))
    return tmp_path / "run/checkpoints/step-000004"


def seal(folder, change=lambda content: None):
    """Let the manifest say what the files are now, and whatever else a test wants it to say."""
    content = json.loads((folder / MANIFEST).read_text())["content"]
    paths = [path for path in _files(folder) if path.name != MANIFEST]
    content["files"] = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths
    }
    change(content)
    (folder / MANIFEST).write_text(json.dumps({"sha256": _seal(content), "content": content}))


def manifest(change):
    return lambda folder: seal(folder, change)


def values(change, file="trainer.json"):
    def spoil(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        seal(folder)

    return spoil


def file(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        seal(folder)

    return spoil


def tensors(name, change):
    def spoil(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, {"format": "pt"})
        seal(folder)

    return spoil


def first(found, kind="lora_A"):
    return next(name for name in found if kind in name)


TRAINER, ACTOR = "trainer.safetensors", "actor/adapter_model.safetensors"
DAMAGES = {
    "another position": manifest(lambda c: c.update(position=[2, 0])),
    "values nested too deeply": file("trainer.json", DEEP),
    "a value that is missing": values(lambda v: v.pop("sources")),
    "tensors that are none": file(TRAINER, b"\x00" * 64),
    "no position": manifest(lambda c: c.pop("position")),
    "a position of text": manifest(lambda c: c.update(position="4")),
    "no run": manifest(lambda c: c.pop("run")),
    "a run without settings": manifest(lambda c: c["run"].pop("config")),
    "a run without a length": manifest(lambda c: c["run"].pop("optimizer_steps")),
    "a run that began never": manifest(lambda c: c["run"].update(begun="yesterday")),
    "a score of text": manifest(lambda c: c.update(score="high")),
    "files that are a list": manifest(lambda c: c.update(files=[])),
    "a format of later": manifest(lambda c: c.update(format=99)),
    "values that are a list": file("trainer.json", "[]"),
    "values that are no JSON": file("trainer.json", "{"),
    "values of another type": values(lambda v: v.update(done="four")),
    "a schedule that is missing": values(lambda v: v.pop("schedule")),
    "totals that are a number": values(lambda v: v.update(totals=3)),
    "the state of another step": values(lambda v: v.update(done=3)),
    "no random numbers": tensors(TRAINER, lambda t: [t.pop(name) for name in list(t) if name.startswith("random.")]),
    "random numbers of another kind": tensors(TRAINER, lambda t: t.update({"random.torch": torch.zeros(3)})),
    "moments of another shape": tensors(TRAINER, lambda t: t.update({first(t, "exp_avg"): torch.zeros(3)})),
    "an adapter of another shape": tensors(ACTOR, lambda t: t.update({first(t): torch.zeros(3, 3)})),
    "an adapter that lacks a tensor": tensors(ACTOR, lambda t: t.pop(first(t))),
    "an adapter with a tensor more": tensors(ACTOR, lambda t: t.update(more=torch.zeros(2))),
    "an adapter that is none": file(ACTOR, b"{}"),
    "heads that lack one": tensors("heads.safetensors", lambda t: t.pop("value.weight")),
    "a hydra.json that lacks roles": values(lambda v: v.pop("roles"), "hydra.json"),
    "a hydra.json nested too deeply": file("hydra.json", DEEP),
    "a hydra.json with a path for a name": values(lambda v: v["adapters"].append("../../out"), "hydra.json"),
}


@pytest.mark.parametrize("name", quick_first(DAMAGES, 2))
def test_named_and_the_one_before_it_used(name, project, newest, capsys, fault):
    DAMAGES[name](newest)
    run = newest.parent.parent
    again = settings(project, "whole")
    again["run"]["output"] = str(run)
    code = main(["ppo", write(run.parent / "again.yaml", again), "--resume"])
    err = capsys.readouterr().err
    assert code == 0, err
    assert "checkpoints/step-000004 is damaged: " in err
    assert "goes on from step-000002" in err
    assert_same(run, project / "whole")
    fault(f"{name} in the newest checkpoint, sealed again", "named, the one before it used", "same bits")


LINES = {
    "metrics of text": ("metrics.jsonl", '{"step": "one"}\n'),
    "metrics nested too deeply": ("metrics.jsonl", DEEP + "\n"),
    "a list in samples": ("samples.jsonl", "[1]\n"),
    "a state that went on from a number": ("state.json", None),
}


@pytest.mark.parametrize("name", quick_first(LINES, 1))
def test_lines_that_no_run_wrote(name, project, newest, capsys):
    run = newest.parent.parent
    shutil.rmtree(newest)
    path, line = LINES[name]
    if line is None:
        state = json.loads((run / path).read_text())
        (run / path).write_text(json.dumps(state | {"resumed": 5, "started": [1]}))
    else:
        with (run / path).open("a") as file:
            file.write(line)
    again = settings(project, "whole")
    again["run"]["output"] = str(run)
    assert main(["ppo", write(run.parent / "again.yaml", again), "--resume"]) == 0, capsys.readouterr().err
    assert_same(run, project / "whole")
