"""All stages from one file: what it means, what each stage needs, that it is run once, and goes on with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hydra_ppo.cli.main import main
from hydra_ppo.cli.rlhf_config import print_plan, read_plan
from hydra_ppo.errors import ConfigError
from tests.faults.project import assert_same, make_project, merge, records, write

FILE = {
    "output": "all",
    "model": {"name_or_path": "base"},
    "data": {"train": "pairs.jsonl", "eval_fraction": 0.2},
    "run": {"progress": False, "memory": "never", "save_every": 2},
    "sft": {"epochs": 2, "batch_size": 8, "eval_every": 3, "optimizer": {"learning_rate": 3e-3}, "run": {"seed": 3}},
    "ppo": {
        "steps": 3,
        "rollout": {"batch_size": 8, "max_new_tokens": 5},
        "minibatch_size": 4,
        "eval_every": 1,
        "eval_rewards": [{"kind": "function", "target": "tests.faults.light:judge"}],
        "reward": {"isolation": "thread"},
        "optimizer": {"learning_rate": 3e-3},
    },
    "export": {"roles": ["actor", "reward"]},
}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file of settings, beside a base and data."""
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rlhf.yaml", FILE)
    return tmp_path / "rlhf.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which all stages were run, in one process."""
    folder = make_project(tmp_path_factory.mktemp("done"))
    write(folder / "rlhf.yaml", FILE)
    root = str(Path(__file__).parents[3])
    ran = subprocess.run(
        [sys.executable, "-m", "hydra_ppo", "rlhf", "rlhf.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    (folder / "said.txt").write_text(ran.stdout)
    return folder


def call(capsys, *words) -> tuple[int, str, str]:
    code = main(["rlhf", *words])
    found = capsys.readouterr()
    return code, found.out, found.err.strip()


def test_what_the_sections_mean(file):
    plan = read_plan(file, {"sft": [], "ppo": ["--kl.coef", "0.5"]})
    assert (plan.sft.model.name_or_path, plan.ppo.model.name_or_path) == ("base", "all/sft")
    assert (plan.sft.run.output, plan.ppo.run.output) == ("all/sft", "all/ppo")
    assert (plan.sft.run.seed, plan.ppo.run.seed) == (3, 0)  # a section's own setting wins over the shared one
    assert plan.sft.run.save_every == plan.ppo.run.save_every == 2
    assert plan.ppo.data == plan.sft.data
    assert plan.ppo.kl.coef == 0.5
    assert plan.export.roles == ["actor", "reward"]


def test_the_file_of_all_settings_reads_back(tmp_path, monkeypatch):
    """Once what is required is filled in, it means what a file of nothing else means."""
    monkeypatch.chdir(tmp_path)
    text = print_plan()
    assert text.count("# Learning rate") + text.count("# Peak learning rate.") >= 2
    content = yaml.safe_load(text)
    needed = {"output": "x", "model": {"name_or_path": "base"}, "data": {"train": "rows.jsonl"}}
    everything = read_plan(Path(write(tmp_path / "a.yaml", merge(content, needed))), {})
    least = read_plan(Path(write(tmp_path / "b.yaml", needed)), {})
    assert (everything.sft, everything.ppo, everything.export) == (least.sft, least.ppo, least.export)


BAD = [
    ({"output": None}, "output=None is no folder; write output: runs/my-run."),
    ({"steps": 3}, "steps is no section of this file; it belongs into the section ppo; indent it there."),
    ({"ppoo": {}}, "ppoo is no section of this file; did you mean ppo?"),
    ({"ppo": {"stepz": 3}}, "ppo: stepz is not a setting; did you mean steps?"),
    ({"ppo": {"steps": 0}}, "ppo: steps=0 must be greater than 0"),
    ({"ppo": 3}, "ppo=3 is no section; indent its settings below it."),
    ({"ppo": {"model": {"name_or_path": "other"}}}, "and this stage begins from all/sft; leave it out."),
    ({"run": {"output": "there"}}, "run.output='there' is where a stage writes; leave it out."),
    ({"sft": {"run": {"overwrite": True}}}, "sft: run.overwrite=True is what --overwrite says; leave it out."),
    ({"export": {"roles": ["actr"]}}, "export: roles=['actr'] is not a list of actor, reward and critic"),
    ({"export": {"dtype": "fp8"}}, "export: dtype='fp8' is no type of weights"),
    ({"export": {"rolls": []}}, "export: rolls is not a setting; did you mean roles?"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: None if isinstance(value, dict) else value[:30])
def test_a_file_that_makes_no_sense(changes, words, tmp_path):
    path = Path(write(tmp_path / "rlhf.yaml", merge(FILE, changes)))
    with pytest.raises(ConfigError) as error:
        read_plan(path, {})
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


AHEAD = [
    ({"ppo": {"data": {"train": "none.jsonl"}}}, "none.jsonl"),
    ({"ppo": {"eval_rewards": [{"kind": "function", "target": "no_such:f"}]}}, "ppo: eval_rewards[0].target='no_such:f'"),
    ({"sft": {"reward_coef": 0.0}}, "ppo: reward.sources[0] is the reward head, which sft.reward_coef=0 does not train"),
    ({"model": {"name_or_path": "nowhere"}}, "sft: model.name_or_path='nowhere' names no such folder"),
    ({"ppo": {"model": {"device": "tpu"}}}, "ppo: model.device='tpu' is not a device"),
    (
        {"sft": {"method": "full"}, "export": {"adapter_only": True}},
        "export: adapter_only=True with roles=[reward]: sft.method='full' trains the base itself",
    ),
]


@pytest.mark.parametrize("flags", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(("changes", "words"), AHEAD, ids=lambda value: None if isinstance(value, dict) else value[:30])
def test_all_stages_are_checked_before_the_first_begins(changes, words, flags, file, capsys):
    write(file, merge(FILE, changes))
    code, _, err = call(capsys, str(file), *flags)
    assert code == 2
    assert words in err.splitlines()[-1]
    assert not Path("all").exists()


def test_a_dry_run_says_what_would_be_run(file, capsys):
    code, out, _ = call(capsys, str(file), "--dry-run")
    assert code == 0
    assert "To be run: sft, ppo, evaluate, export." in out
    assert "which sft writes" in out
    assert not Path("all").exists()


def test_stages_that_lack_what_they_need(file, capsys):
    for stage, needed in (("ppo", "sft"), ("evaluate", "ppo"), ("export", "ppo")):
        code, _, err = call(capsys, str(file), "--stage", stage)
        assert (code, err) == (2, f"stage {stage} needs all/{needed}, which is not there; run --stage {needed} first.")


def test_words_that_do_not_go_together(file, capsys):
    assert call(capsys, str(file), "--resume", "--overwrite")[::2] == (
        2,
        "--resume goes on and --overwrite begins again; leave one out.",
    )
    assert "no file is named" in call(capsys)[2]
    assert "did you mean optimizer.learning_rate?" in call(capsys, str(file), "--ppo.lr", "3")[2]


def test_what_all_stages_leave(done):
    found = json.loads((done / "all/summary.json").read_text())
    sft, ppo = (json.loads((done / f"all/{stage}/summary.json").read_text()) for stage in ("sft", "ppo"))
    assert found["sft_perplexity"] == sft["eval/perplexity"]
    assert found["reward_accuracy"] == sft["eval/reward_accuracy"]
    assert found["score_gain"] == ppo["eval_scores_after"] - ppo["eval_scores_before"]
    assert found["score_gain_se"] == ppo["eval_scores_gain_se"]
    assert found["independent_gain"] == ppo["eval_independent_gain"]
    # The saved actor, loaded again, gives the numbers of the last evaluation in training.
    evaluated = json.loads((done / "all/evaluation/metrics.json").read_text())
    last = records(done / "all/ppo")[-1]
    assert {name: value for name, value in evaluated.items() if name.startswith("eval/")} == {
        name: value for name, value in last.items() if name.startswith("eval/")
    }
    answers = [json.loads(line) for line in (done / "all/evaluation/answers.jsonl").read_text().splitlines()]
    assert sum(answer["score"] for answer in answers) / len(answers) == pytest.approx(evaluated["eval/scores"])
    assert found["exported"] == ["actor", "reward"]
    assert (done / "all/export/actor/model.safetensors").is_file()
    assert (done / "all/export/reward/config.json").is_file()
    said = (done / "said.txt").read_text()
    for words in (
        "SFT perplexity",
        "reward accuracy",
        "gain, with its standard error",
        "independent evaluator",
        "alarms",
        "all/ppo",
    ):
        assert words in said
    assert yaml.safe_load((done / "all/sft/config.yaml").read_text())["epochs"] == 2


def test_a_finished_stage_is_not_run_again(done, monkeypatch, capsys):
    monkeypatch.chdir(done)
    before = {path: path.stat().st_mtime_ns for path in (done / "all").rglob("*.safetensors")}
    code, out, _ = call(capsys, "rlhf.yaml")
    assert code == 0
    assert [f"{stage}: finished" in out for stage in ("sft", "ppo", "evaluate", "export")] == [True] * 4
    assert {path: path.stat().st_mtime_ns for path in (done / "all").rglob("*.safetensors")} == before
    assert call(capsys, "rlhf.yaml", "--ppo.kl.coef", "0.5")[::2] == (
        2,
        "stage ppo in all/ppo is finished with other settings: kl.coef was 0.02, is 0.5. Put that back, choose another output, "
        "or run it again with --stage ppo --overwrite.",
    )
    code, _, err = call(capsys, "rlhf.yaml", "--ppo.steps", "4")
    assert (code, err) == (2, "stage ppo in all/ppo is finished: steps was 3, is 4; go on with --stage ppo --resume.")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_ctrl_c_in_a_stage_and_resume_give_the_bits_of_a_run_in_one_piece(stage, file, done, monkeypatch, capsys):
    from hydra_ppo.training import joint_sft, ppo_update

    module = joint_sft if stage == "sft" else ppo_update
    real, seen = module.check_stop, {"count": 0}

    def stop():
        seen["count"] += 1
        if seen["count"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        real()

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_stop", stop)
        code, out, _ = call(capsys, str(file))
    assert code == 0
    assert f"Stopped in the stage {stage}. Go on with all: hydra-ppo rlhf {file} --resume" in out
    code, _, err = call(capsys, str(file))
    assert code == 2
    assert f"stage {stage} in all/{stage} is not finished (interrupted); go on with --resume" in err
    assert call(capsys, str(file), "--resume")[0] == 0
    for name in ("sft", "ppo"):
        assert_same(Path("all") / name, done / "all" / name)
    ours, theirs = (json.loads((place / "summary.json").read_text()) for place in (Path("all"), done / "all"))
    assert ours == theirs


def test_stages_one_by_one_again_and_longer(file, capsys):
    assert call(capsys, str(file), "--stage", "sft")[0] == 0
    assert not Path("all/ppo").exists()
    assert call(capsys, str(file), "--stage", "ppo", "evaluate")[0] == 0
    first = json.loads(Path("all/evaluation/metrics.json").read_text())
    assert call(capsys, str(file), "--stage", "ppo", "evaluate", "--resume", "--ppo.steps", "4")[0] == 0
    assert records(Path("all/ppo"))[-1]["step"] == 4
    assert json.loads(Path("all/evaluation/metrics.json").read_text()) != first  # of the longer run
    assert call(capsys, str(file), "--stage", "sft", "--overwrite")[0] == 0
    code, _, err = call(capsys, str(file), "--ppo.steps", "4")
    assert code == 2
    assert "stage ppo in all/ppo began from an earlier sft; begin it again with --stage ppo --overwrite" in err
    assert call(capsys, str(file), "--stage", "ppo", "export", "--overwrite")[0] == 0
    assert Path("all/export/actor").is_dir()
