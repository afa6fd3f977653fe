"""Runs with the methods around Hydra: stopped again and again, killed, and gone on with to the same bits."""

from __future__ import annotations

import random

import pytest

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, sft_settings, write
from tests.faults.test_killed import go, kill_and_go_on
from tests.faults.test_stop_and_resume import stop_at

PAIRS = "pairs.jsonl"
IN_LOSS = {"estimator": "squared", "place": "loss", "adaptive": False, "horizon": 10000}
VARIANTS = {
    "no critic, spread, practised": {
        "advantage": "group",
        "group_std": False,
        "variance_increase": "length",
        "rollout": {"samples_per_prompt": 4},
        "ema_decay": 0.9,
        "ptx": {"data": PAIRS, "coef": 0.5},
        "rehearsal": {"data": PAIRS, "clusters": 2, "share": 0.5},
        "loss_average": "longest",
    },
    "a bounded critic of its own pace": {
        "value_range": [-4.0, 4.0],
        "reward": {"score_clip": 4.0},
        "kl": IN_LOSS,
        "critic_updates_per_actor": 2,
        "update_order": "in-turn",
        "critic_lambda": 1.0,
        "actor_lambda": "length",
        "bootstrap_truncated": True,
        "critic_warmup_steps": 2,
    },
    "a running mean of rewards": {"advantage": "reinforce", "kl": {"estimator": "js_unbiased"}, "dual_clip": 3.0},
    "leave one out": {"advantage": "rloo", "rollout": {"samples_per_prompt": 2}, "variance_increase": "reference"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, pairs, and an SFT run whose reward head says something."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    assert main(["sft", write(folder / "sft.yaml", sft_settings(folder, "sft"))]) == 0
    return folder


def made(project, output, variant):
    settings = ppo_settings(project, output, **VARIANTS[variant])
    settings["model"]["name_or_path"] = str(project / "sft")
    for kind in ("ptx", "rehearsal"):
        if kind in settings:
            settings[kind] = settings[kind] | {"data": str(project / PAIRS)}
    return settings


@pytest.fixture(scope="module")
def whole(project):
    """Runs that were left alone, by variant."""
    done = {}

    def get(variant):
        if variant not in done:
            folder = f"whole-{len(done)}"
            assert main(["ppo", write(project / "whole.yaml", made(project, folder, variant))]) == 0
            done[variant] = project / folder
        return done[variant]

    return get


@pytest.mark.parametrize("variant", quick_first(VARIANTS, 2))
def test_stopped_again_and_again(variant, project, whole, monkeypatch, tmp_path, fault):
    reference = whole(variant)
    settings = made(project, "run", variant)
    settings["run"]["output"] = str(tmp_path / "run")
    arguments = ["ppo", write(tmp_path / "run.yaml", settings), "--resume"]
    stops = 0
    for number in (8, 19, 10, 26, 9, 14):
        with monkeypatch.context() as patch:
            seen = stop_at(patch, number)
            assert main(arguments) == 0
        stops += seen["count"] >= number
    assert stops >= 4
    assert main(arguments) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x {stops} in ppo, {variant}", "saved, exit 0, --resume", "same bits, metrics, samples")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed(variant, project, tmp_path, fault):
    settings = made(project, "alone", variant)
    assert go(["ppo", write(project / "alone.yaml", settings)], project / "alone.log") == 0
    points = {"rollout": 1, "update": 2, "write": 1}
    kills = kill_and_go_on("ppo", settings, points, project / "alone", tmp_path, random.Random(3))
    fault(f"SIGKILL x {sum(kills.values())} in ppo, {variant}", "the checkpoint before is whole", "same bits")
