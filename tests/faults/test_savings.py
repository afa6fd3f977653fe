"""Runs with every way to spare memory for moments and gradients: stopped, killed, out of memory, gone on with, and changed."""

from __future__ import annotations

import random

import pytest
from safetensors.torch import load_file

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, records, sft_settings, weights, write
from tests.faults.test_killed import go, kill_and_go_on
from tests.faults.test_out_of_memory import fail_once
from tests.faults.test_sealed_again import seal
from tests.faults.test_stop_and_resume import stop_at

RANK = {"model": {"lora": {"r": 64}}}
"""So that every matrix has 4096 numbers, and 8-bit moments."""

VARIANTS = {
    "all of it": {
        "model": {
            **RANK["model"],
            "quantization": "nf4",
            "quantize_embeddings": "int8",
            "checkpoint_offload": True,
            "tile_tokens": 4,
        },
        "rollout": {"kv_cache": "int8", "weights": "merged-bf16", "max_drift": 1e-4, "importance_cap": 2.0},
        "optimizer": {"name": "adamw-8bit", "offload_in_rollout": True},
        "update_order": "in-turn",
    },
    "8 bit, away, in turn": {
        **RANK,
        "optimizer": {"name": "adamw-8bit", "offload_in_rollout": True},
        "update_order": "in-turn",
    },
    "offloaded, in turn": {"optimizer": {"name": "adamw-offloaded"}, "update_order": "in-turn", "critic_warmup_steps": 2},
    "away": {"optimizer": {"offload_in_rollout": True, "weight_decay": 0.1}, "model": {"quantization": "nf4"}},
    "8 bit, early stop": {**RANK, "optimizer": {"name": "adamw-8bit"}, "update_order": "in-turn", "target_kl": 1e-3},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    """Runs that were left alone, by name."""
    done = {}

    def get(name, **changes):
        if name not in done:
            folder = f"whole-{len(done)}"
            assert main(["ppo", write(project / "whole.yaml", ppo_settings(project, folder, **changes))]) == 0
            done[name] = project / folder
        return done[name]

    return get


@pytest.mark.parametrize("variant", quick_first(VARIANTS, 2))
def test_stopped_again_and_again(variant, project, whole, monkeypatch, tmp_path, fault):
    reference = whole(variant, **VARIANTS[variant])
    settings = ppo_settings(project, **VARIANTS[variant])
    settings["run"]["output"] = str(tmp_path / "run")
    arguments = ["ppo", write(tmp_path / "run.yaml", settings), "--resume"]
    stops = 0
    for number in (8, 19, 10, 26, 9, 14, 15, 11):
        with monkeypatch.context() as patch:
            seen = stop_at(patch, number)
            assert main(arguments) == 0
        stops += seen["count"] >= number
    assert stops == 8
    assert main(arguments) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x 8 in ppo, {variant}", "saved, exit 0, --resume", "same bits, metrics, samples")


def test_a_run_with_all_of_it_is_read_by_the_other_commands(project, whole, tmp_path, capsys):
    run = whole("all of it", **VARIANTS["all of it"])
    first = records(run)[1]  # after the evaluation before training
    assert first["rollout/drift"] > 1e-4
    assert first["rollout/recomputed"] == 1.0
    assert 0 < first["rollout/importance_weight"] < 2
    assert main(["generate", str(run), "--prompt", "w1 w2", "--max-new-tokens", "3"]) == 0
    assert main(["inspect", str(run)]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--output", str(tmp_path / "actor")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trained over a base held as nf4 with embeddings in int8, written over the unquantised one" in said
    settings = ppo_settings(project, run.name, **VARIANTS["all of it"])
    settings["model"]["quantize_embeddings"] = None
    settings["steps"] = 7
    assert main(["ppo", write(tmp_path / "other.yaml", settings), "--resume"]) == 2
    assert "model.quantize_embeddings was 'int8', is None" in " ".join(capsys.readouterr().err.split())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [pytest.param(1, id="some"), pytest.param(6, id="many", marks=pytest.mark.long)])
def test_killed(count, project, tmp_path, fault):
    changes = VARIANTS["8 bit, away, in turn"]
    settings = ppo_settings(project, **changes)
    settings["run"]["output"] = str(tmp_path / "left-alone")
    assert go(["ppo", write(tmp_path / "alone.yaml", settings)], tmp_path / "alone.log") == 0
    points = dict.fromkeys(("score", "update", "write"), count)
    kills = kill_and_go_on("ppo", ppo_settings(project, **changes), points, tmp_path / "left-alone", tmp_path, random.Random(5))
    fault(f"SIGKILL x {sum(kills.values())} in ppo, 8 bit, away, in turn", "gone on with --resume", "same bits")


@pytest.mark.parametrize("phase", quick_first(["update-critic", "update-actor", "optimizer"], 1))
def test_out_of_memory_in_turn(phase, project, whole, monkeypatch):
    """In the first optimizer step all that follows has the smaller size, and the actor's first half had what it has now."""
    changes = {"update_order": "in-turn", "eval_every": 0, "steps": 2, "data": {"eval_fraction": 0.0}}
    number = 1
    if phase != "update-actor":  # the actor's half is done in micro-batches of 4: those after it are of 2
        changes |= {"critic_warmup_steps": 1}
    reference = whole(f"small-{phase}", microbatch_size=2, **changes)
    settings = ppo_settings(project, f"oom-{phase}", microbatch_size=4, **changes)
    with monkeypatch.context() as patch:
        fail_once(patch, phase, number)
        assert main(["ppo", write(project / "oom.yaml", settings)]) == 0
    assert_same(project / f"oom-{phase}", reference)


def bytes_and_parameters(folder):
    files = [folder / name / "adapter_model.safetensors" for name in ("actor", "critic")] + [folder / "heads.safetensors"]
    trained = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), trained


def test_a_checkpoint_of_8_bit_moments_holds_6_bytes_a_parameter(project, whole):
    """4 of the weight, 2 of the moments, 1/32 of their scales; two moments in fp32 are 12."""
    run = whole("8 bit, away, in turn", **VARIANTS["8 bit, away, in turn"])
    size, trained = bytes_and_parameters(run / "checkpoints" / "step-000006")
    assert trained > 200_000
    names = 192 * 1024  # of five tensors a parameter, random sources, settings
    assert 6 * trained < size < (6 + 1 / 32) * trained + names
    moments = load_file(run / "checkpoints" / "step-000006" / "trainer.safetensors")
    assert not any("qmap" in name for name in moments)


def interrupted(project, name, **changes):
    """Return a run that was killed after its fourth step."""
    settings = ppo_settings(project, name, **changes)
    assert main(["ppo", write(project / "part.yaml", {**settings, "steps": 4})]) == 0
    return settings


@pytest.mark.parametrize(
    "after",
    quick_first(
        [{"name": "adamw-offloaded"}, {"offload_in_rollout": True}],
        2,
    ),
    ids=str,
)
def test_where_exact_moments_are_kept_may_change(after, project, whole):
    plain = {"eval_every": 0, "run": {"save_every": 2}}
    name = f"change-{'-'.join(after)}"
    settings = interrupted(project, name, **plain)
    settings["optimizer"] |= after
    assert main(["ppo", write(project / "again.yaml", settings), "--resume"]) == 0
    reference = whole("plain", **plain)
    assert weights(project / name) == weights(reference)
    ours, theirs = records(project / name, without=("eval/",)), records(reference, without=("eval/",))
    assert ours[-1] == theirs[-1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer": {"name": "adamw-8bit"}}, "optimizer.name was 'adamw', is 'adamw-8bit'"),
        ({"update_order": "in-turn"}, "update_order was 'together', is 'in-turn'"),
    ],
    ids=["8 bit", "order"],
)
def test_what_is_not_exact_may_not_change(changes, line, project, capsys):
    settings = ppo_settings(project, f"refused-{len(line)}", steps=1)
    assert main(["ppo", write(project / "first.yaml", settings)]) == 0
    longer = ppo_settings(project, f"refused-{len(line)}", steps=2, **changes)
    assert main(["ppo", write(project / "second.yaml", longer), "--resume"]) == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_checkpoint_of_before_these_were_settings_is_gone_on_with(project, whole):
    plain = {"eval_every": 0, "run": {"save_every": 2}}
    settings = interrupted(project, "older", **plain)

    def forget(content):
        config = content["run"]["config"]
        del config["update_order"], config["optimizer"]["name"], config["optimizer"]["offload_in_rollout"]

    for folder in (project / "older" / "checkpoints").iterdir():
        seal(folder, forget)
    assert main(["ppo", write(project / "again.yaml", settings), "--resume"]) == 0
    assert weights(project / "older") == weights(whole("plain", **plain))


@pytest.mark.parametrize(
    ("command", "changes", "line"),
    [
        ("ppo", {"optimizer": {"name": "paged-adamw-8bit"}}, "optimizer.name='paged-adamw-8bit' needs CUDA"),
        ("sft", {"optimizer": {"name": "paged-adamw-8bit"}}, "optimizer.name='paged-adamw-8bit' needs CUDA"),
        ("sft", {"optimizer": {"offload_in_rollout": True}}, "optimizer.offload_in_rollout=True has nothing to do in sft"),
        (
            "ppo",
            {"optimizer": {"name": "adamw-offloaded", "offload_in_rollout": True}},
            "optimizer.offload_in_rollout=True has nothing to do with name='adamw-offloaded'",
        ),
        ("ppo", {"optimizer": {"name": "sgd"}}, "optimizer.name='sgd'"),
    ],
)
def test_what_cannot_be_had_is_said_before_a_weight_is_read(command, changes, line, project, monkeypatch, capsys):
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    make = {"ppo": ppo_settings, "sft": sft_settings}[command]
    path = write(project / "wrong.yaml", make(project, "wrong", model={"device": "cpu"}, **changes))
    for options in ([], ["--dry-run"]):
        assert main([command, path, *options]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        assert said.startswith(line), said
    assert not (project / "wrong").exists()


@pytest.mark.parametrize("name", quick_first(["adamw-8bit", "adamw-offloaded"], 1))
def test_sft_stopped_and_gone_on_with(name, project, monkeypatch):
    changes = {**RANK, "optimizer": {"name": name}}
    assert main(["sft", write(project / "sft.yaml", sft_settings(project, f"sft-{name}", **changes))]) == 0
    settings = sft_settings(project, f"stopped-{name}", **changes)
    arguments = ["sft", write(project / "sft.yaml", settings), "--resume"]
    for number in (3, 9, 14):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            assert main(arguments) == 0
    assert main(arguments) == 0
    assert_same(project / f"stopped-{name}", project / f"sft-{name}")
    plain = sft_settings(project, f"plain-{name}", **RANK)
    assert main(["sft", write(project / "sft.yaml", plain)]) == 0
    same = weights(project / f"plain-{name}") == weights(project / f"sft-{name}")
    assert same == (name == "adamw-offloaded")
