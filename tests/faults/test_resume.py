"""Going on with a run: after damage, after the end, and with settings that changed."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, records, sft_settings, write


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, data, and runs of 6 and of 3 steps."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    assert main(["ppo", write(folder / "whole.yaml", ppo_settings(folder, "whole", run={"keep_last": 6}))]) == 0
    assert main(["ppo", write(folder / "short.yaml", ppo_settings(folder, "short", steps=3))]) == 0
    return folder


@pytest.fixture
def run(project, tmp_path):
    """A copy of the whole run that may be spoiled, as if it had been killed after step 6."""
    shutil.copytree(project / "whole", tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    (tmp_path / "run" / "state.json").write_text(json.dumps(state | {"state": "running", "finished": None}))
    return tmp_path / "run"


def go_on(project, run, /, **changes):
    settings = ppo_settings(project, **changes)
    settings["run"]["output"] = str(run)
    return main(["ppo", write(run.parent / "again.yaml", settings), "--resume"])


def test_a_checkpoint_holds_what_is_trained_and_little_else(project):
    """Weight and two moments of each trained parameter, in fp32; no base."""
    from safetensors.torch import load_file

    folder = project / "whole" / "checkpoints" / "step-000006"
    files = [folder / name / "adapter_model.safetensors" for name in ("actor", "critic")] + [folder / "heads.safetensors"]
    trained = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 12 * trained < size < 12 * trained + 160 * 1024  # names, random sources, settings


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", quick_first(["trainer.safetensors", "checkpoint.json", "trainer.json", "actor/adapter_model.safetensors"], 1)
)
def test_one_flipped_bit_in_the_newest_checkpoint(name, project, run, capsys, fault):
    flip(run / "checkpoints" / "step-000006" / name)
    assert go_on(project, run) == 0
    err = capsys.readouterr().err
    assert "checkpoints/step-000006 is damaged: " in err
    assert "goes on from step-000004" in err
    assert_same(run, project / "whole")
    fault(f"a flipped bit in {name} of the newest checkpoint", "named, the one before it used", "same bits")


@pytest.mark.long
def test_every_checkpoint_damaged(project, run, capsys):
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "trainer.safetensors")
    assert go_on(project, run) == 2
    assert "holds no checkpoint that is whole (checkpoints/step-000006 is damaged: trainer.saf" in capsys.readouterr().err


def test_a_planted_pickle_is_never_read(project, run, capsys, fault):
    (run / "checkpoints" / "step-000006" / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")
    assert go_on(project, run) == 0
    assert "step-000006 is damaged: optimizer.pt does not belong to it" in capsys.readouterr().err
    assert not list(run.parent.rglob("exploded"))
    assert_same(run, project / "whole")
    fault("a pickle planted in a checkpoint", "refused by name, never opened, the one before it used", "same bits")


@pytest.mark.parametrize("name", quick_first(["metrics.jsonl", "samples.jsonl"], 1))
def test_a_torn_last_line(name, project, run):
    shutil.rmtree(run / "checkpoints" / "step-000006")
    with (run / name).open("a") as file:
        file.write('{"step": 7, "objective/sc')
    assert go_on(project, run) == 0
    assert_same(run, project / "whole")


def test_a_finished_run_is_left_alone_and_says_how_to_go_on(project, capsys):
    before = (project / "short" / "state.json").read_text()
    assert main(["ppo", str(project / "short" / "config.yaml"), "--resume"]) == 0
    assert "is finished, with 3 steps; raise steps or epochs to go on" in capsys.readouterr().out
    assert (project / "short" / "state.json").read_text() == before


def test_a_finished_run_is_made_longer(project, tmp_path, fault):
    shutil.copytree(project / "short", tmp_path / "run")
    assert go_on(project, tmp_path / "run", steps=6) == 0
    assert_same(tmp_path / "run", project / "whole")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert [entry["step"] for entry in state["resumed"]] == [3]
    fault("a finished run of 3 steps asked for 6", "went on", "same bits as 6 steps from the start")


@pytest.mark.long
def test_a_finished_sft_run_is_made_longer(project, tmp_path):
    for name, epochs in (("whole-sft", 4), ("short-sft", 2)):
        assert main(["sft", write(tmp_path / "sft.yaml", sft_settings(project, name, epochs=epochs))]) == 0
    settings = sft_settings(project, "short-sft", epochs=4)
    assert main(["sft", write(tmp_path / "sft.yaml", settings), "--resume"]) == 0
    whole, run = (records(project / name) for name in ("whole-sft", "short-sft"))
    assert [line["step"] for line in run] == [line["step"] for line in whole]
    assert run[-1] == whole[-1]


def test_ctrl_c_right_after_a_save_and_again(project, run, monkeypatch, capsys, fault):
    """A stop where a checkpoint was just written makes no second one of that step, and both parts go on."""
    shutil.rmtree(run / "checkpoints" / "step-000006")
    from hydra_ppo.runtime import interruption

    check = interruption.check_stop

    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        check()

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("hydra_ppo.rollout.decoder.check_stop", stop)
            assert go_on(project, run) == 0
        assert "Go on with: hydra-ppo ppo" in capsys.readouterr().out
        assert json.loads((run / "state.json").read_text())["state"] == "interrupted"
        assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000004"
    assert go_on(project, run) == 0
    assert_same(run, project / "whole")
    fault("SIGINT right after a checkpoint, twice", "one checkpoint of that step", "same bits")


@pytest.mark.long
def test_a_second_signal_stops_at_once(project, run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "step-000006")

    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("hydra_ppo.rollout.decoder.check_stop", stop)
    monkeypatch.setattr("hydra_ppo.runtime.interruption.TOGETHER", 0.0)
    assert go_on(project, run) == 130
    monkeypatch.undo()
    assert go_on(project, run) == 0
    assert_same(run, project / "whole")


FREE = {
    "log_every": {
        "run": {"log_every": 1, "save_every": 1, "keep_last": 1, "keep_best": 0, "memory": "auto", "progress": False}
    },
    "time_limit": {"reward": {"time_limit": 5.0}},
}


@pytest.mark.parametrize("name", quick_first(FREE, 1))
def test_what_may_change(name, project, run):
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert go_on(project, run, **FREE[name]) == 0
    ours, theirs = (
        [{k: v for k, v in line.items() if "memory/" not in k} for line in records(folder)]
        for folder in (run, project / "whole")
    )
    assert ours == theirs


@pytest.mark.long
def test_a_moved_run_goes_on(project, run):
    shutil.rmtree(run / "checkpoints" / "step-000006")
    run.rename(run.parent / "elsewhere")
    assert go_on(project, run.parent / "elsewhere") == 0
    assert_same(run.parent / "elsewhere", project / "whole")


REFUSED = {
    "kl": ({"kl": {"coef": 0.5}}, ["kl.coef was 0.02, is 0.5"]),
    "two at once": (
        {"optimizer": {"learning_rate": 1e-4}, "rollout": {"max_new_tokens": 4}},
        ["optimizer.learning_rate was 0.003, is 0.0001", "rollout.max_new_tokens was 5, is 4"],
    ),
    "seed": ({"run": {"seed": 1}}, ["run.seed was 0, is 1"]),
    "fewer steps": ({"steps": 5}, ["6 steps are done or begun, more than the 5 asked for"]),
    "another cache": ({"rollout": {"kv_cache": "int8"}}, ["rollout.kv_cache was 'auto', is 'int8'"]),
    "another quantisation": ({"model": {"quantization": "nf4"}}, ["model.quantization was None, is 'nf4'"]),
}


@pytest.mark.parametrize("name", quick_first(REFUSED, 2))
def test_what_may_not_change(name, project, run, capsys, monkeypatch):
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    changes, parts = REFUSED[name]
    assert go_on(project, run, **changes) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot go on from step-000006: " in line
    assert "Put that back, or start a new run" in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize("what", ["base weights", "tokenizer", "data"])
def test_what_a_run_stands_on_may_not_change(what, run, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    here = make_project(tmp_path / "project")  # the same content as where the run began
    settings = ppo_settings(here)
    settings["run"]["output"] = str(run)
    before = json.loads((run / "checkpoints" / "step-000006" / "checkpoint.json").read_text())["content"]["run"]["config"]
    settings["model"]["name_or_path"], settings["data"]["train"] = before["model"]["name_or_path"], before["data"]["train"]
    copy = tmp_path / "copy"
    base = shutil.copytree(settings["model"]["name_or_path"], copy / "base")
    data = shutil.copy(settings["data"]["train"], copy / "pairs.jsonl")
    named = _change(what, base, data)
    originals = {settings["model"]["name_or_path"]: base, settings["data"]["train"]: data}
    with _swapped(originals):
        assert main(["ppo", write(tmp_path / "again.yaml", settings), "--resume"]) == 2
    assert named in capsys.readouterr().err
    fault(f"{what} changed before --resume", "refused before the model was loaded", "nothing was written")


def _change(what, base, data):
    if what == "base weights":
        flip(base / "model.safetensors")
        return "model model.safetensors changed"
    if what == "tokenizer":
        path = base / "tokenizer.json"
        path.write_text(path.read_text().replace('"w3"', '"w3x"'))
        return "tokenizer changed"
    with open(data, "a") as file:
        file.write('{"prompt": "w1 w2", "chosen": "w3", "rejected": "w9"}\n')
    return "data changed"


class _swapped:
    """Put other files in the place of some while the block runs."""

    def __init__(self, others):
        self.others = others

    def __enter__(self):
        for path, other in self.others.items():
            os.rename(path, f"{path}.kept")
            os.rename(other, path)

    def __exit__(self, *error):
        for path in self.others:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            os.rename(f"{path}.kept", path)


@pytest.mark.parametrize("schedule", quick_first(["linear", "cosine"], 1))
def test_a_schedule_that_looks_at_the_end_cannot_be_made_longer(schedule, project, tmp_path, capsys):
    optimizer = {"schedule": schedule, "learning_rate": 1e-3}
    settings = ppo_settings(project, f"decay-{schedule}", steps=2, optimizer=optimizer)
    assert main(["ppo", write(tmp_path / "a.yaml", settings)]) == 0
    assert main(["ppo", write(tmp_path / "a.yaml", settings | {"steps": 3}), "--resume"]) == 2
    assert f"has other learning rates from the start than one of 8 (optimizer.schedule='{schedule}'" in capsys.readouterr().err


def test_resume_without_a_run_begins_one(project, tmp_path, capsys):
    assert go_on(project, tmp_path / "new", steps=1, eval_every=0) == 0
    assert "holds no checkpoint yet; the run starts at the first step" in capsys.readouterr().err


def test_a_run_of_another_command_is_refused(project, capsys):
    settings = sft_settings(project, "whole")
    assert main(["sft", write(project / "other.yaml", settings), "--resume"]) == 2
    assert "holds a run of ppo, not of sft" in capsys.readouterr().err


def test_a_run_of_one_pass_is_made_two(project, tmp_path, capsys, fault):
    """What is in the folder is the length in passes; 20 prompts less 4 held out, 8 a step, make 2 steps and 4."""
    passes = {"epochs": 1, "eval_every": 0}
    whole, parts = (ppo_settings(project, str(tmp_path / name), **passes) for name in ("whole", "parts"))
    for settings in (whole, parts):
        del settings["steps"]
    assert main(["ppo", write(tmp_path / "whole.yaml", whole), "--epochs", "2"]) == 0
    assert main(["ppo", write(tmp_path / "parts.yaml", parts)]) == 0
    first = json.loads((tmp_path / "parts" / "summary.json").read_text())["steps"]
    assert main(["ppo", str(tmp_path / "parts.yaml"), "--epochs", "2", "--resume"]) == 0
    assert_same(tmp_path / "parts", tmp_path / "whole", without=("eval/",))
    prompts = len((project / "pairs.jsonl").read_text().splitlines()) - 5
    assert (first, len(records(tmp_path / "whole")) - 1) == (-(-prompts // 8), -(-2 * prompts // 8))
    capsys.readouterr()
    assert main(["ppo", str(tmp_path / "parts.yaml"), "--steps", "9", "--resume"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "epochs=1 and steps=9 both say how long the run is; leave one out."
    fault("a run of one pass over the prompts", "two passes were asked for", "it went on, with the bits of one run")
