"""A run whose score is gamed: the evaluator falls, the alarm fires, the run stops with all of it saved, and goes on exactly."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, merge, ppo_settings, records, weights, write

GAMED = {
    "reward": {"sources": [{"kind": "function", "target": "tests.faults.light:proxy"}], "score_normalization": False},
    "eval_rewards": [
        {"kind": "function", "target": "tests.faults.light:noisy_judge"},
        {"kind": "function", "target": "tests.faults.light:judge", "weight": 0.0, "name": "words"},
    ],
    "data": {"eval_fraction": 0.5},
    "kl": {"coef": 0.0, "adaptive": False},
    "rollout": {"batch_size": 16, "max_new_tokens": 6},
    "optimizer": {"learning_rate": 1.5e-2},
    "minibatch_size": 8,
    "steps": 12,
    "eval_every": 1,
    "monitor": {"window": 4, "kl_budget": 500.0},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, data, and a whole run that nothing stops."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # a random head is small, and leaves adapters little to say
    model.save_pretrained(folder / "base")
    assert main(["ppo", write(folder / "whole.yaml", ppo_settings(folder, "whole", **GAMED))]) == 0
    return folder


def go(project, output, *flags, **changes):
    return main(["ppo", write(project / "again.yaml", ppo_settings(project, output, **merge(GAMED, changes))), *flags])


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_what_a_run_with_an_evaluator_leaves(project, capsys):
    run, lines = project / "whole", records(project / "whole")
    assert [line["step"] for line in lines] == list(range(13))  # the first is of before training
    assert set(lines[0]) >= {"eval/scores", "eval/independent", "eval/independent/noisy_judge", "eval/independent/words"}
    assert "objective/scores" not in lines[0]
    assert lines[0]["eval/independent"] == lines[0]["eval/independent/noisy_judge"]  # the other has no weight
    assert lines[-1]["eval/scores"] > lines[0]["eval/scores"] + 0.2
    assert lines[-1]["eval/independent"] < lines[0]["eval/independent"] - 0.2
    found = summary(run)
    assert found["eval_independent_before"] == lines[0]["eval/independent"]
    assert found["eval_independent_after"] == lines[-1]["eval/independent"]
    gain = lines[-1]["eval/independent"] - lines[0]["eval/independent"]
    assert found["eval_independent_gain"] == pytest.approx(gain)
    assert 0 < found["eval_independent_gain_se"] < -gain / 3
    assert set(found["eval_independent_by_name"]) == {"noisy_judge", "words"}
    assert found["stopped_by"] is None
    alarms = records(run, "alarms.jsonl")
    assert found["alarms"] == [{"step": alarm["step"], "name": alarm["name"]} for alarm in alarms]
    assert "over_optimisation" in {alarm["name"] for alarm in alarms}
    first = next(alarm["step"] for alarm in alarms if alarm["name"] == "over_optimisation")
    assert all(line["alarms"] == 0 for line in lines[1:first] if line["step"] < min(alarm["step"] for alarm in alarms))
    assert lines[first]["alarms"] >= 1
    samples = [row for row in records(run, "samples.jsonl") if row.get("held_out")]
    assert {row["step"] for row in samples} == set(range(13))
    assert set(samples[0]) == {"step", "held_out", "prompt", "response", "score", "independent", "judges"}
    assert {"monitor.png", "over_optimisation.png"} <= {path.name for path in (run / "plots").iterdir()}
    capsys.readouterr()
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "over_optimisation" in said
    assert "eval/independent/words" in said
    assert main(["inspect", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["alarms"]) == len(alarms)


def test_evaluators_never_enter_training(project):
    """Without them, and without a monitor, the same bits are trained."""
    assert go(project, "alone", eval_rewards=[], monitor={"enabled": False}) == 0
    assert weights(project / "alone") == weights(project / "whole")
    assert not (project / "alone" / "alarms.jsonl").exists()
    without = ("eval/independent", "alarms")
    plain = records(project / "alone", without=("eval/independent", "alarms"))
    assert plain == records(project / "whole", without=without)


def test_an_alarm_stops_a_run_and_resume_goes_on_as_if_nothing_had_been(project, capsys, fault):
    changes = {"monitor": {"stop_on_alarm": ["over_optimisation"]}}
    assert go(project, "stopped", **changes) == 0
    run = project / "stopped"
    found, whole = summary(run), summary(project / "whole")
    first = next(alarm["step"] for alarm in whole["alarms"] if alarm["name"] == "over_optimisation")
    assert (found["stopped_by"], found["steps"]) == ("over_optimisation", first)
    assert first < 12
    assert json.loads((run / "state.json").read_text())["state"] == "finished"
    assert (run / "checkpoints" / f"step-{first:06d}").is_dir()
    assert (run / "actor" / "adapter_model.safetensors").is_file()
    assert records(run) == records(project / "whole")[: first + 1]
    assert "stopped by alarm over_optimisation; --resume goes on" in capsys.readouterr().err
    # The same alarm is on still, and is not raised again at once.
    assert go(project, "stopped", "--resume", **changes) == 0
    assert_same(run, project / "whole")
    assert records(run, "alarms.jsonl") == records(project / "whole", "alarms.jsonl")
    found = summary(run)
    assert (found["stopped_by"], found["alarms"]) == (None, whole["alarms"])
    assert found["eval_independent_gain_se"] == whole["eval_independent_gain_se"]
    fault("an alarm that the run is to stop at, --resume", "saved, finished, exit 0; went on", "same bits, metrics, alarms")


def test_an_alarm_between_evaluations_is_evaluated_and_the_rest_is_the_same(project):
    """A stop at a step that is not evaluated adds an evaluation there, and nothing that a longer run would see."""
    changes = {"eval_every": 5, "monitor": {"ratio_max": 1.0001}}
    assert go(project, "plain", **changes) == 0
    assert go(project, "ratio", **merge(changes, {"monitor": {"stop_on_alarm": True}})) == 0
    run = project / "ratio"
    assert (summary(run)["stopped_by"], summary(run)["steps"]) == ("ratio", 1)
    assert "eval/independent" in records(run)[-1]
    assert summary(run)["eval_independent_after"] == records(run)[-1]["eval/independent"]
    assert go(project, "ratio", "--resume", **changes) == 0
    assert weights(run) == weights(project / "plain")
    ours, theirs = records(run), records(project / "plain")
    assert ours[2:] == theirs[2:]
    assert {name: value for name, value in ours[1].items() if not name.startswith("eval/")} == theirs[1]
    assert records(run, "alarms.jsonl") == records(project / "plain", "alarms.jsonl")


@pytest.mark.parametrize("number", [1, 4, pytest.param(9, marks=pytest.mark.long)])
def test_a_signal_in_the_middle_of_an_evaluation(number, project, monkeypatch, fault):
    """Evaluations are sampled again, and not judged, logged or counted twice."""
    output = f"signal-{number}"
    from hydra_ppo.training.ppo import PPOTrainer

    seen = {"count": 0}
    real = PPOTrainer._asked

    def stop(self, scorer, *arguments):
        if scorer is self.judges:
            seen["count"] += 1
            if seen["count"] == number:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, scorer, *arguments)

    monkeypatch.setattr(PPOTrainer, "_asked", stop)
    assert go(project, output) == 0
    assert json.loads((project / output / "state.json").read_text())["state"] == "interrupted"
    assert go(project, output, "--resume") == 0
    assert_same(project / output, project / "whole")
    assert records(project / output, "alarms.jsonl") == records(project / "whole", "alarms.jsonl")
    fault(f"SIGTERM while evaluation {number} is judged", "saved, exit 0, --resume", "same bits, metrics, samples, alarms")


def test_thresholds_may_change_on_resume_and_evaluators_may_not(project, capsys):
    assert go(project, "short", steps=2) == 0
    assert go(project, "short", "--resume", steps=3, monitor={"window": 6, "length_r2": None}) == 0
    capsys.readouterr()
    assert go(project, "short", "--resume", steps=4, eval_rewards=[]) == 2
    assert "eval_rewards was [{" in capsys.readouterr().err


REFUSED = {
    "no held-out prompts": (
        ["--data.eval_fraction", "0"],
        "eval_rewards judge answers to held-out prompts, and data.eval=None with data.eval_fraction=0.0 holds none;",
    ),
    "what training raises": (
        ["--eval_rewards", "[{kind: function, target: 'tests.faults.light:proxy'}]"],
        "eval_rewards[0]: the function tests.faults.light:proxy is reward.sources[0], which training raises",
    ),
    "one name twice": (
        ["--eval_rewards", "[{kind: function, target: 'a:b', name: x}, {kind: function, target: 'a:c', name: x}]"],
        "eval_rewards: name='x' is given to 2 of them",
    ),
    "a module that is not there": (
        ["--eval_rewards", "[{kind: function, target: 'no_such:f'}]"],
        "eval_rewards[0].target='no_such:f' names no installed package",
    ),
    "a column that is not there": (
        ["--eval_rewards", "[{kind: function, target: 'tests.faults.light:wants_column'}]"],
        "takes 'answer', which is none of",
    ),
    "a head that was never trained": (["--eval_rewards", "[{kind: head}]"], "was never trained"),
    "a stop without an evaluator": (
        ["--eval_rewards", "[]", "--monitor.stop_on_alarm", "[over_optimisation]"],
        "monitor.stop_on_alarm names over_optimisation, which is seen by eval_rewards, and there are none;",
    ),
    "a word that is no alarm": (["--monitor.stop_on_alarm", "[klo]"], "monitor.stop_on_alarm="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(name, project, capsys, fault):
    flags, words = REFUSED[name]
    assert go(project, "refused", *flags) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in line
    assert not (project / "refused").exists()
    fault(f"eval_rewards, {name}", "one line, exit 2", "nothing written")
