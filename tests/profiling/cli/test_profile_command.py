"""`hydra-ppo profile` from the command line."""

from __future__ import annotations

import json

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.profiling.measuring.record import KINDS, Record
from tests.profiling.models import CONFIGS

SIZES = ["--prompt", "16", "--response", "8", "--rollout-batch", "4", "--rank", "4", "--dtype", "fp32"]


@pytest.fixture
def model(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_json_of_one_method(model, capsys):
    assert main(["profile", "--model", model, "--simulate", "--quantization", "nf4", *SIZES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] == max(size for phase, size in found["phases"].items() if phase != "load")
    assert sum(found["kinds"].values()) == found["peak_bytes"] == sum(found["roles"].values())
    assert set(found["kinds"]) <= set(KINDS)
    assert found["static_bytes"] < found["floor_bytes"] < found["peak_bytes"]
    assert list(found["phases"]) == ["load", "rollout", "score", "update-actor", "update-critic", "optimizer"]
    assert found["responses_per_second"] is None


def test_how_moments_are_kept_reaches_the_trainer(model, tmp_path, capsys):
    flags = ["--optimizer", "adamw-8bit", "--update-order", "in-turn", "--offload-in-rollout"]
    command = ["profile", "--model", model, "--simulate", *SIZES, "--rank", "32", "--json", "--output"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "flags"), *flags]) == 0
    capsys.readouterr()
    plain, spared = (Record.load(tmp_path / name / "record.json").profiles[0] for name in ("plain", "flags"))
    chosen = {"optimizer": "adamw-8bit", "update_order": "in-turn", "offload_in_rollout": True}
    assert {name: spared.settings[name] for name in chosen} == chosen
    assert spared.host_bytes > 0 == plain.host_bytes
    # 12 bytes of gradient and moments a parameter were held for both roles; now 2 of moments, and of one role 4 of gradient
    assert (spared.floor_bytes - spared.static_bytes) / (plain.floor_bytes - plain.static_bytes) == pytest.approx(
        4 / 12, rel=0.1
    )


def test_methods_are_compared_and_the_report_can_be_redrawn(model, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["profile", "--model", model, "--simulate", "--methods", "full,hydra", *SIZES]
    assert main([*command, "--json", "--output", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert list(found) == ["full", "hydra"]
    assert found["full"]["peak_bytes"] > 3 * found["hydra"]["peak_bytes"]
    names = {path.name for path in out.iterdir()}
    assert names == {"record.json", "report.html", "comparison.png", "timeline-full.png", "timeline-hydra.png"}
    assert Record.load(out / "record.json").profiles[1].peak_bytes == found["hydra"]["peak_bytes"]
    first = (out / "report.html").read_text()
    assert main(["profile", "--from", str(out / "record.json"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").read_text() == first
    assert "hydra" in capsys.readouterr().out


def test_a_real_run_measures_speed_too(model, capsys):
    assert main(["profile", "--model", model, "--device", "cpu", "--timed-steps", "1", *SIZES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["responses_per_second"] > 0


def test_the_two_ways_to_train_a_reward_model(model, capsys):
    command = ["profile", "--model", model, "--simulate", "--stage", "reward", "--methods", "full,lora", *SIZES, "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert found["lora"]["peak_bytes"] < found["full"]["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing; give --model"),
        (["--model", "llama-9", "--simulate"], "model='llama-9' is no shipped name"),
        (["--model", "gpt2", "--methods", "trio"], "methods='trio' is not a method of stage='ppo'"),
        (["--model", "gpt2", "--stage", "reward", "--methods", "hydra"], "methods='hydra' is not a method of stage='reward'"),
        (["--model", "gpt2", "--methods", "full", "--quantization", "nf4"], "quantization='nf4' leaves no weights"),
        (["--model", "gpt2", "--prompt", "0"], "prompt=0 must be at least 1"),
        (["--model", "gpt2", "--rollout-batch", "8", "--minibatch", "3"], "rollout_batch=8 is not divisible by minibatch=3"),
        (["--model", "gpt2", "--trunk-layers", "-1"], "trunk_layers=-1 must not be negative"),
        (["--model", "gpt2", "--simulate", "--trunk-layers", "12"], "model.trunk_layers=12 must be at least 0 and below"),
        (["--model", "gpt2", "--trunk-layers", "0,1"], "trunk_layers=0,1 is a list, which only --learning compares"),
        (["--learning", "--trunk-layers", "0,1"], "trunk_layers=1 is compared for the method 'hydra' alone, not for 'full'"),
        (["--from", "nothing.json"], "nothing.json: No such file"),
        (["--simulat"], "did you mean --simulate?"),
        (["--model", "gpt2", "--quantization", "q4"], "invalid choice"),
        (["--model", "gpt2", "--optimizer", "sgd"], "invalid choice"),
        (["--model", "gpt2", "--update-order", "in-turn", "--methods", "j-hydra"], "update_order='in-turn' steps the actor"),
        (
            ["--model", "gpt2", "--stage", "reward", "--offload-in-rollout"],
            "offload_in_rollout=True has nothing to do in stage=",
        ),
        (
            ["--model", "gpt2", "--optimizer", "adamw-offloaded", "--offload-in-rollout"],
            "offload_in_rollout=True has nothing to",
        ),
        (
            ["--model", "gpt2", "--device", "cpu", "--optimizer", "paged-adamw-8bit"],
            "optimizer.name='paged-adamw-8bit' needs CUDA",
        ),
    ],
)
def test_bad_input_costs_one_line(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err


def test_the_commands_are_listed_and_have_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("profile", "plan", "doctor"):
        assert name in text
        assert main([name, "--help"]) == 0
