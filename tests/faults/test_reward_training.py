"""Runs with several reward heads, other losses and floor pairs: stopped, killed, out of memory, in two processes, refused."""

from __future__ import annotations

import json
import random

import pytest
import torch

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, records, sft_settings, weights, write
from tests.faults.test_killed import go, kill_and_go_on
from tests.faults.test_out_of_memory import GPU_TEXT
from tests.faults.test_sealed_again import seal
from tests.faults.test_stop_and_resume import stop_at
from tests.ranks import Ranks

VARIANTS = {
    "all of it": {"reward_heads": 3, "reward_loss": "divergent", "floor_share": 0.25, "floor_steps": 2},
    "advantage": {"reward_heads": 2, "reward_loss": "advantage", "floor_share": 0.25},
    "margin": {"reward_loss": "margin", "data": {"format": "rated"}, "floor_steps": 1, "floor_kinds": ["random-tokens"]},
    "reward alone": {"sft_coef": 0.0, "reward_heads": 3, "floor_steps": 2, "optimizer": {"name": "adamw-offloaded"}},
    "full": {"method": "full", "reward_heads": 3, "head_share": 0.5, "floor_steps": 1},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    with (folder / "rated.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            rated = {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "ratings": [2 + i % 3, 1.5]}
            file.write(json.dumps(rated) + "\n")
    return folder


def settings(project, variant, output="run", **changes):
    made = sft_settings(project, output, **VARIANTS[variant])
    if made["data"].get("format") == "rated":
        made["data"]["train"] = str(project / "rated.jsonl")
    return made | changes


@pytest.fixture(scope="module")
def whole(project):
    """Runs that were left alone, by variant."""
    done = {}

    def get(variant):
        if variant not in done:
            done[variant] = project / f"whole-{len(done)}"
            assert main(["sft", write(project / "whole.yaml", settings(project, variant, done[variant].name))]) == 0
        return done[variant]

    return get


@pytest.mark.parametrize("variant", quick_first(VARIANTS, 2))
def test_stopped_again_and_again(variant, project, whole, monkeypatch, tmp_path, fault):
    reference = whole(variant)
    made = settings(project, variant)
    made["run"]["output"] = str(tmp_path / "run")
    arguments = ["sft", write(tmp_path / "run.yaml", made), "--resume"]
    stops = 0
    for number in (1, 3, 9, 2, 14, 8):
        with monkeypatch.context() as patch:
            seen = stop_at(patch, number)
            assert main(arguments) == 0
        stops += seen["count"] >= number
    assert stops >= 5
    assert main(arguments) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x {stops} in sft, reward training: {variant}", "saved, exit 0, --resume", "same bits, metrics")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [pytest.param(1, id="some"), pytest.param(4, id="many", marks=pytest.mark.long)])
def test_killed(count, project, tmp_path, fault):
    made = settings(project, "all of it")
    made["run"]["output"] = str(tmp_path / "left-alone")
    assert go(["sft", write(tmp_path / "alone.yaml", made)], tmp_path / "alone.log") == 0
    points = {"sft-update": count, "write": count}
    kills = kill_and_go_on("sft", settings(project, "all of it"), points, tmp_path / "left-alone", tmp_path, random.Random(7))
    fault(f"SIGKILL x {sum(kills.values())} in sft, reward training: all of it", "gone on with --resume", "same bits")


def test_two_processes_take_the_same_pairs(project, tmp_path):
    """Pieces of one pair differ by the order of sums alone; with two pieces of four there are two addends."""
    changes = {"microbatch_size": 4, "data": {"train": str(project / "pairs.jsonl"), "eval_fraction": 1 / 3}}
    found = []
    for size in (1, 2):
        made = settings(project, "all of it", f"ranks-{size}", **changes)
        ranks = Ranks(["sft", write(tmp_path / f"{size}.yaml", made)], tmp_path / f"ranks-{size}", size)
        assert ranks.wait() == [0] * size, ranks.said()
        found.append(project / f"ranks-{size}")
    assert_same(found[1], found[0], ("parallel", "eval", "loss/", "train"))


def test_out_of_memory(project, monkeypatch):
    """The half that is done again is of the same pairs, heads and floor pairs."""
    from hydra_ppo.training.joint_sft import JointSFTTrainer

    changes = {"data": {"train": str(project / "pairs.jsonl"), "eval_fraction": 0.0}}
    assert main(["sft", write(project / "a.yaml", settings(project, "all of it", "small", microbatch_size=2, **changes))]) == 0
    passes, seen = JointSFTTrainer.pass_over, []

    def once(self, rows):
        seen.append(len(rows))
        if len(seen) == 2:
            raise torch.OutOfMemoryError(GPU_TEXT)
        return passes(self, rows)

    monkeypatch.setattr(JointSFTTrainer, "pass_over", once)
    assert main(["sft", write(project / "b.yaml", settings(project, "all of it", "oom", microbatch_size=4, **changes))]) == 0
    assert seen[:4] == [4, 4, 2, 2]
    assert_same(project / "oom", project / "small")


@pytest.mark.parametrize("variant", quick_first(["advantage", "all of it"], 1))
def test_ppo_on_such_a_reward_model_stopped(variant, project, whole, monkeypatch, tmp_path, fault):
    reward = {"sources": [{"kind": "head", "aggregate": "lcb", "aggregate_coef": 0.5}], "score_normalization": True}
    made = ppo_settings(project, "ppo-" + variant[:3], steps=4)
    made |= {"model": {"name_or_path": str(whole(variant))}, "reward": reward}
    assert main(["ppo", write(tmp_path / "whole.yaml", made)]) == 0
    reference = project / ("ppo-" + variant[:3])
    assert all(line["reward/head/spread"] > 0 for line in records(reference) if line["step"] > 0)
    made["run"]["output"] = str(tmp_path / "run")
    arguments = ["ppo", write(tmp_path / "run.yaml", made), "--resume"]
    for number in (8, 19, 10, 15):
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            assert main(arguments) == 0
    assert main(arguments) == 0
    assert_same(tmp_path / "run", reference)
    fault(f"SIGTERM x 4 in ppo on a reward model of several heads, {variant}", "saved, --resume", "same bits, metrics, samples")


@pytest.mark.parametrize("name", ["reward_heads", "head_share", "reward_loss", "floor_share", "floor_steps", "floor_kinds"])
def test_what_a_run_is_made_of_may_not_change(name, project, whole, capsys):
    other = {
        "reward_heads": 2,
        "head_share": 0.5,
        "reward_loss": "bradley-terry",
        "floor_share": 0.5,
        "floor_steps": 1,
        "floor_kinds": ["truncated"],
    }
    whole("all of it")
    made = settings(project, "all of it", "whole-0", **{name: other[name]})
    made["epochs"] = 4
    assert main(["sft", write(project / "changed.yaml", made), "--resume"]) == 2
    assert f"{name} was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "changes", "line"),
    [
        ("sft", {"reward_loss": "margin"}, "24 of 24 rows are malformed; first at line 1: margin is missing"),
        ("sft", {"reward_heads": 3, "reward_coef": 0.0}, "reward_heads=3 has nothing to do with reward_coef=0"),
        ("sft", {"floor_share": 0.02}, "floor_share=0.02 gives 0 floor pairs in a batch_size of 8"),
        ("sft", {"reward_heads": 4, "model": {"name_or_path": "whole"}}, "reward_heads=4 does not go with a run whose reward"),
        ("sft", {"reward_heads": 2, "model": {"name_or_path": "whole"}}, "reward_loss: the run was trained with 'advantage'"),
        (
            "ppo",
            {"model": {"name_or_path": "one"}, "reward": {"sources": [{"kind": "head", "aggregate": "minimum"}]}},
            "reward.sources[0].aggregate='minimum' needs a model with several reward heads, this one has 1",
        ),
    ],
)
def test_what_makes_no_sense_is_said_before_a_weight_is_read(command, changes, line, project, whole, monkeypatch, capsys):
    names = {"whole": str(whole("advantage")), "one": str(project / "one")}
    if not (project / "one").exists():
        assert main(["sft", write(project / "one.yaml", sft_settings(project, "one", max_steps=1))]) == 0
    capsys.readouterr()
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    if "model" in changes:
        changes = changes | {"model": {"name_or_path": names[changes["model"]["name_or_path"]]}}
    made = (ppo_settings if command == "ppo" else sft_settings)(project, "wrong") | changes
    for options in ([], ["--dry-run"]):
        assert main([command, write(project / "wrong.yaml", made), *options]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert line in said
    assert not (project / "wrong").exists()


def test_a_checkpoint_of_before_these_were_settings_is_gone_on_with(project, tmp_path):
    """Of ppo too, whose sources are a list: what a source could not say yet is at its default."""
    made = sft_settings(project, "base-of-ppo", max_steps=2)
    assert main(["sft", write(tmp_path / "sft.yaml", made)]) == 0
    changes = {"model": {"name_or_path": str(project / "base-of-ppo")}, "reward": {"sources": [{"kind": "head"}]}}
    for name, steps in (("whole-ppo", 4), ("older", 2)):
        made = ppo_settings(project, name, **changes, steps=steps, eval_every=0)
        assert main(["ppo", write(tmp_path / "ppo.yaml", made)]) == 0

    def forget(content):
        for source in content["run"]["config"]["reward"]["sources"]:
            del source["aggregate"], source["aggregate_coef"]

    for folder in (project / "older" / "checkpoints").iterdir():
        seal(folder, forget)
    made = ppo_settings(project, "older", **changes, steps=4, eval_every=0)
    assert main(["ppo", write(tmp_path / "ppo.yaml", made), "--resume"]) == 0
    assert weights(project / "older") == weights(project / "whole-ppo")


def test_floor_pairs_that_the_rows_do_not_give(project, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "w1", "chosen": f"w{i} w2 w3", "rejected": "w9"} for i in range(4, 12)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    data = {"train": str(tmp_path / "one.jsonl"), "eval_fraction": 0.0}
    made = sft_settings(project, "wrong", floor_steps=1, data=data)
    for options in ([], ["--dry-run"]):
        assert main(["sft", write(tmp_path / "wrong.yaml", made), *options]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.endswith("'other-prompt' changes no answer of data.train; leave it out.")
    assert not (project / "wrong").exists()


def test_a_dry_run_counts_floor_pairs(project, capsys):
    made = settings(project, "all of it", "dry")
    made["data"]["eval_fraction"] = 0.0
    assert main(["sft", write(project / "dry.yaml", made), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # 24 pairs by 6 of each batch are 4 steps an epoch, 3 epochs, and 2 steps of floor pairs before them.
    assert "optimizer steps 1 14" in said
    assert "preference pairs, 2 of them floor pairs 8 112" in said
    assert main(["sft", write(project / "dry.yaml", made)]) == 0
    assert records(project / "dry")[-1]["step"] == 14
