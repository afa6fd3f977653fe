"""Faults of the disk, of numbers, of reward functions and of users: one line, nothing lost, and the run can go on."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch

from hydra_ppo.cli.main import main
from tests.faults import rewards
from tests.faults.child import context
from tests.faults.child import run as run_child
from tests.faults.project import assert_same, make_project, merge, ppo_settings, quick_first, sft_settings, write

NOISY = "tests.faults.rewards:noisy"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    """A run of four steps that nothing happened to."""
    assert main(["ppo", write(project / "whole.yaml", settings(project, "whole"))]) == 0
    return project / "whole"


def settings(project, output, function=NOISY, time_limit=1.0, **changes):
    common = {"steps": 4, "run": {"save_every": 1}, "eval_every": 0}
    # One name, whatever the function: runs are compared metric by metric.
    reward = {"sources": [{"kind": "function", "target": function, "name": "judge"}], "time_limit": time_limit}
    reward["isolation"] = "thread"  # so that a test can count its calls
    made = ppo_settings(project, str(output), **merge(common, changes))
    made["reward"] |= reward
    made["run"]["output"] = str(project / output)
    return made


def go(project, output, *flags, function=NOISY, **changes):
    rewards.calls["count"] = 0
    path = write(project / "settings.yaml", settings(project, output, function, **changes))
    return main(["ppo", path, *flags])


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def go_on_and_compare(project, output, whole, monkeypatch, function=NOISY):
    """Mend the function, go on, and end as if nothing had happened."""
    name = function.split(":")[1]
    monkeypatch.setattr(rewards, name, rewards.noisy)
    assert go(project, output, "--resume", function=function) == 0
    assert_same(project / output, whole, without=("eval/",))


REWARDS = {
    "raises": "raised OSError: the judge is down (rewards.py, line 36, in raises); mend the function",
    "sleeps": "took over reward.time_limit=1 s",
    "spins": "took over reward.time_limit=1 s",
    "too_few": "returned 7 numbers for 8 responses",
    "nothing": "returned NoneType; it must return one number per response",
    "not_a_number": "is nan for response 0",
}


@pytest.mark.parametrize("name", quick_first(REWARDS, 2))
def test_a_reward_function_that(name, project, whole, monkeypatch, capsys, fault):
    function = f"tests.faults.rewards:{name}"
    assert go(project, name, function=function) == 1
    line = last_line(capsys)
    assert line.startswith("step=2 phase=score: ")
    assert REWARDS[name] in line
    assert json.loads((project / name / "state.json").read_text())["state"] == "failed"
    assert (project / name / "checkpoints" / "step-000001").is_dir()
    go_on_and_compare(project, name, whole, monkeypatch, function)
    fault(f"a reward function that {name}", "exit 1, one line, the checkpoint before is whole", "same bits after --resume")


def test_a_data_file_that_changes_during_the_run(project, whole, capsys, fault):
    data = project / "changing.jsonl"
    shutil.copy(project / "pairs.jsonl", data)
    rewards.DATA["path"] = str(data)
    changes = {"data": {"train": str(data)}}
    assert go(project, "data", function="tests.faults.rewards:spoil_data", **changes) == 0
    assert_same(project / "data", whole)
    assert go(project, "data", "--resume", function="tests.faults.rewards:spoil_data", steps=5, **changes) == 2
    assert "is malformed" in last_line(capsys)
    fault("a data file that changes during the run", "the run keeps what it read; --resume is refused", "same bits")


def test_nan_in_the_base(project, capsys, fault):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(project / "base", project / "broken")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert go(project, "nan-base", model={"name_or_path": str(base)}) == 2
    assert "NaN or infinite (weight that is: model.layers.1.mlp.up_proj.weight); get the model again" in last_line(capsys)
    assert not (project / "nan-base").exists()
    fault("NaN in a weight of the base", "exit 2, the weight is named", "nothing was written")


@pytest.mark.long
def test_nan_for_one_token_only(project, capsys, fault):
    """What no look at the model finds before it meets that token."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(project / "base", project / "broken-token")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert go(project, "nan-token", model={"name_or_path": str(base)}) == 1
    assert "phase=rollout: log-probs of sampled tokens are nan" in last_line(capsys)
    assert not (project / "nan-token" / "actor").exists()
    fault("NaN in one embedding of the base", "exit 1, phase and quantity are named", "no model was written")


@pytest.mark.parametrize("where", quick_first(["policy/grad_norm", "policy/loss", "value/loss"], 1))
def test_nan_in_training(where, project, whole, monkeypatch, capsys, fault):
    from hydra_ppo.training.ppo_update import Updates

    output = "nan-" + where.replace("/", "-")
    with monkeypatch.context() as patch:
        seen = {"count": 0}
        name = "critic_backward" if where == "value/loss" else "actor_backward"
        real = getattr(Updates, name)

        def broken(self, *arguments, **options):
            found = real(self, *arguments, **options)
            seen["count"] += 1
            if seen["count"] == 11:  # in the second step
                if where == "policy/grad_norm":
                    self.parameters["actor"][0].grad[0] = float("inf")
                else:
                    found[0] = float("nan")
            return found

        patch.setattr(Updates, name, broken)
        assert go(project, output) == 1
    line = last_line(capsys)
    assert line.startswith("step=2 phase=update, optimizer step ")
    assert f": {where} is " in line
    assert "The last checkpoint is intact" in line
    assert sorted(path.name for path in (project / output / "checkpoints").iterdir()) == ["step-000001"]
    go_on_and_compare(project, output, whole, monkeypatch)
    fault(f"NaN or infinity in {where}", "exit 1, one line, the checkpoint before is whole", "same bits after --resume")


def test_nan_in_sft(project, monkeypatch, capsys):
    from hydra_ppo.training.joint_sft import JointSFTTrainer
    from hydra_ppo.training.sft_metrics import PairSums

    def broken(self, rows):
        nan = torch.tensor(float("nan"), requires_grad=True)
        return PairSums(nan, nan, nan.detach())

    monkeypatch.setattr(JointSFTTrainer, "pass_over", broken)
    assert main(["sft", write(project / "sft.yaml", sft_settings(project, "nan-sft"))]) == 1
    assert last_line(capsys).startswith("step=1 phase=update: loss/sft is nan")


@pytest.mark.long
def test_a_stop_after_nan_does_not_save_it(project, whole, monkeypatch, capsys):
    """A wish to stop that comes between NaN and its detection must not make a checkpoint of it."""
    from hydra_ppo.runtime.interruption import StopRequested
    from hydra_ppo.training.ppo_update import Updates

    with monkeypatch.context() as patch:
        step = Updates.optimizer_step

        def broken(self, roles):
            found = step(self, roles)
            if self.state.done == 1 and self.state.partial.optimizer_steps == 1:
                with torch.no_grad():
                    self.parameters["actor"][0].fill_(float("nan"))
                raise StopRequested
            return found

        patch.setattr(Updates, "optimizer_step", broken)
        assert go(project, "nan-stop") == 1
    assert "is not finite; it is not saved" in last_line(capsys)
    go_on_and_compare(project, "nan-stop", whole, monkeypatch)


def child(project, output, *flags, limit=None, log="child.log", **changes):
    """Run in a process of its own; return its exit code and what it printed."""
    path = write(project / f"{output}.yaml", settings(project, output, **changes))
    (project / log).unlink(missing_ok=True)
    process = context().Process(target=run_child, args=(["ppo", path, *flags], str(project / log), None, limit))
    process.start()
    return process, project / log


def test_a_disk_that_is_full_while_saving(project, whole, monkeypatch, fault):
    """A true failed write: the process may not write a file larger than the adapters, so the optimizer's does not fit."""
    assert go(project, "full", steps=2) == 0
    sizes = sorted(path.stat().st_size for path in (project / "full/checkpoints/step-000002").rglob("*.safetensors"))
    assert sizes[-1] > sizes[-2]
    process, log = child(project, "full", "--resume", limit={"file_bytes": sizes[-1] - 1})
    process.join(60)
    assert process.exitcode == 1
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith("checkpoints/step-000003 could not be written (")
    assert "checkpoints/step-000002 is intact. Make room on the disk, then go on with --resume." in line
    assert sorted(path.name for path in (project / "full/checkpoints").iterdir()) == ["step-000001", "step-000002"]
    go_on_and_compare(project, "full", whole, monkeypatch)
    fault(
        "a disk that is full while a checkpoint is written",
        "exit 1, the checkpoint before is whole",
        "same bits after --resume",
    )


@pytest.mark.long
def test_a_disk_that_is_full_for_the_metrics(project, whole, monkeypatch, capsys, fault):
    from hydra_ppo.runs.run import Run

    with monkeypatch.context() as patch:
        real = Run._write_state
        assert go(project, "metrics", steps=2) == 0
        full = project / "metrics" / "metrics.jsonl"
        full.rename(project / "kept")
        full.symlink_to("/dev/full")

        def no_state(self):
            if self._state["state"] != "running":
                raise OSError(28, "No space left on device")
            real(self)

        patch.setattr(Run, "_write_state", no_state)
        patch.setattr("hydra_ppo.runs.run.keep_steps", lambda *a: None)
        assert go(project, "metrics", "--resume") == 1
    assert "metrics.jsonl cannot be written (No space left on device); checkpoints/step-000002 is intact" in last_line(capsys)
    full.unlink()
    (project / "kept").rename(full)
    go_on_and_compare(project, "metrics", whole, monkeypatch)
    fault("a disk that is full for the metrics", "exit 1, one line", "same bits after --resume")


def test_a_folder_that_cannot_be_written(project, capsys, fault):
    for output in ("/proc/run", "/proc/1/deep/run"):
        made = settings(project, "x")
        made["run"]["output"] = output
        assert main(["ppo", write(project / "ro.yaml", made)]) == 2
        assert f"run.output='{output}' cannot be " in last_line(capsys)
    fault("a run folder that cannot be written", "exit 2, one line", "nothing was written")


@pytest.mark.long
def test_a_folder_that_becomes_unwritable(project, whole, monkeypatch, capsys, fault):
    """Permissions do not stop the superuser, a file where a folder should be stops everybody."""
    assert go(project, "locked", steps=2) == 0
    checkpoints = project / "locked" / "checkpoints"
    from hydra_ppo.training.ppo import PPOTrainer

    with monkeypatch.context() as patch:
        real = PPOTrainer._rollout

        def spoil(self, step):
            checkpoints.rename(project / "kept-checkpoints")
            checkpoints.write_text("")
            return real(self, step)

        patch.setattr(PPOTrainer, "_rollout", spoil)
        assert go(project, "locked", "--resume") == 1
    assert "checkpoints/step-000003 could not be written (" in last_line(capsys)
    checkpoints.unlink()
    (project / "kept-checkpoints").rename(checkpoints)
    go_on_and_compare(project, "locked", whole, monkeypatch)
    fault("a run folder that becomes unwritable", "exit 1, one line", "same bits after --resume")


def test_two_runs_on_one_folder(project, whole, monkeypatch, capsys, fault):
    process, _ = child(project, "twice", function="tests.faults.rewards:hangs", time_limit=None)
    deadline = time.monotonic() + 60
    while not (project / "twice" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.is_alive()
    for flags in ([], ["--resume"], ["--run.overwrite", "true"]):
        assert go(project, "twice", *flags) == 2
        assert f"is being written by process {process.pid}; wait for it, stop it, or choose another" in last_line(capsys)
    process.kill()
    process.join()
    # What a dead process held is free at once, whoever has its number now.
    state = json.loads((project / "twice" / "state.json").read_text())
    (project / "twice" / "state.json").write_text(json.dumps(state | {"pid": os.getpid()}))
    go_on_and_compare(project, "twice", whole, monkeypatch, "tests.faults.rewards:hangs")
    fault("a second run on the same folder", "exit 2 with the pid of the first; free once that is dead", "same bits")


def test_a_tokenizer_larger_than_the_embedding(project, monkeypatch, capsys, fault):
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    from tests.training import write_model

    base = write_model(project / "small", vocab_size=30)
    assert go(project, "tokens", model={"name_or_path": str(base)}) == 2
    assert "has embeddings for 30 tokens, its tokenizer gives ids up to 31 ('w27')" in last_line(capsys)
    assert not (project / "tokens").exists()
    fault("a tokenizer larger than the embedding", "exit 2 before the model was loaded", "nothing was written")


def test_an_adapter_of_another_base(project, capsys, fault):
    other = make_project(project / "other")
    assert main(["sft", write(project / "sft.yaml", sft_settings(other, "sft", epochs=1))]) == 0
    from hydra_ppo.model.hydra import HydraModel
    from tests.training import write_model

    assert HydraModel.from_pretrained(other / "sft").reward_head_trained
    write_model(other / "base", initializer_range=0.03)  # the same shapes, other weights
    assert go(project, "adapter", model={"name_or_path": str(other / "sft")}) == 2
    assert "holds adapters of another base than" in last_line(capsys)
    assert not (project / "adapter").exists()
    fault("an adapter of another base, of the same shapes", "exit 2", "nothing was written")


def test_the_same_seed_gives_the_same_run(project, whole, fault):
    assert go(project, "again") == 0
    assert_same(project / "again", whole)
    fault("nothing, the same seed twice", "-", "same bits")
