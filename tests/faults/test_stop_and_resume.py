"""Stopped by a signal at any micro-step and gone on with, a run ends with the same bits as one that was left alone."""

from __future__ import annotations

import os
import signal

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.runtime import interruption
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, sft_settings, write


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


VARIANTS = {
    "fp32": {},
    "nf4": {"model": {"quantization": "nf4"}},
    "trunk": {"model": {"trunk_layers": 1}},
    "linear": {"optimizer": {"schedule": "linear", "warmup_fraction": 0.3}},
}


@pytest.fixture(scope="module")
def whole(project):
    """Runs that were left alone, by command and variant."""
    done = {}

    def get(command, variant):
        if (command, variant) not in done:
            make = ppo_settings if command == "ppo" else sft_settings
            settings = make(project, f"whole-{command}-{variant}", **(VARIANTS | SFT_VARIANTS)[variant])
            assert main([command, write(project / "whole.yaml", settings)]) == 0
            done[command, variant] = project / f"whole-{command}-{variant}"
        return done[command, variant]

    return get


SFT_VARIANTS = {"full": {"method": "full"}}


def stop_at(monkeypatch, number):
    """Send SIGTERM to this process at the micro-step of that number; count micro-steps."""
    seen = {"count": 0}
    check = interruption.check_stop

    def counting():
        seen["count"] += 1
        if seen["count"] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        check()

    for module in ("rollout.decoder", "rollout.collect", "training.ppo_update", "training.joint_sft"):
        monkeypatch.setattr(f"hydra_ppo.{module}.check_stop", counting)
    return seen


@pytest.mark.parametrize("variant", quick_first(VARIANTS, 1))
def test_ppo_stopped_again_and_again(project, whole, variant, monkeypatch, capsys, tmp_path, fault):
    reference = whole("ppo", variant)
    settings = ppo_settings(project, **VARIANTS[variant])
    settings["run"]["output"] = str(tmp_path / "run")
    arguments = ["ppo", write(tmp_path / "run.yaml", settings)]
    stops = 0
    for number in (1, 8, 19, 13, 2, 26, 9, 15, 5, 11):
        with monkeypatch.context() as patch:
            seen = stop_at(patch, number)
            assert main([*arguments, "--resume"]) == 0
        stops += seen["count"] >= number
        out = capsys.readouterr().out
        if seen["count"] >= number:
            assert f"hydra-ppo ppo {tmp_path / 'run' / 'config.yaml'} --resume" in out
    assert stops == 10
    assert main([*arguments, "--resume"]) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x 10 in ppo, {variant}", "saved, exit 0, --resume", "same bits, metrics, samples")


def test_ppo_stopped_between_rollout_and_first_update(project, whole, monkeypatch, tmp_path):
    """No checkpoint is there yet, so the rollout is kept: its samples must be too."""
    settings = ppo_settings(project)
    settings["run"]["output"] = str(tmp_path / "run")
    arguments = ["ppo", write(tmp_path / "run.yaml", settings), "--resume"]
    check = interruption.check_stop

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        check()

    with monkeypatch.context() as patch:
        patch.setattr("hydra_ppo.training.ppo_update.check_stop", stop)
        assert main(arguments) == 0
    assert main(arguments) == 0
    assert_same(tmp_path / "run", whole("ppo", "fp32"))


@pytest.mark.parametrize("variant", quick_first(["fp32", "nf4", "full"], 1))
def test_sft_stopped_again_and_again(project, whole, variant, monkeypatch, tmp_path, fault):
    reference = whole("sft", variant)
    settings = sft_settings(project, **(VARIANTS | SFT_VARIANTS)[variant])
    settings["run"]["output"] = str(tmp_path / "run")
    arguments = ["sft", write(tmp_path / "run.yaml", settings)]
    for number in (1, 3, 9, 2, 14, 8):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            assert main([*arguments, "--resume"]) == 0
    assert main([*arguments, "--resume"]) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x 6 in sft, {variant}", "saved, exit 0, --resume", "same bits, metrics")
