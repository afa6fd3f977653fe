"""`hydra-ppo sft` and `ppo` in several processes: what one process gives, and what becomes of it when something goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy
import pytest
from safetensors.torch import load_file

from hydra_ppo.cli.main import main
from tests.faults.project import assert_same, make_project, merge, ppo_settings, quick_first, sft_settings, write
from tests.ranks import Ranks

ALIKE = ("parallel",)
"""Metrics that one process does not have."""

# As many pieces as processes, so that sums have two addends, and five held-out prompts in two batches.
EVEN = {"rollout": {"generation_batch_size": 4, "score_batch_size": 4}, "run": {"save_every": 1}}

VARIANTS = {
    "fp32": {},
    "nf4, in-turn": {"model": {"quantization": "nf4"}, "update_order": "in-turn"},
    "8-bit": {
        "optimizer": {"name": "adamw-8bit"},
        "rollout": {"kv_cache": "int8", "max_drift": 1e-9, "importance_cap": 2.0},
        "model": {"quantize_embeddings": "int8"},
    },
    "stopped by KL": {"target_kl": 1e-4, "critic_warmup_steps": 1, "optimizer": {"weight_decay": 0.1}},
}
"""Each with what another part of the loop does; only the first is not left to `make test-faults`."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def settings(project, output, *changes, command="ppo"):
    made = (ppo_settings if command == "ppo" else sft_settings)(project)
    for change in (EVEN if command == "ppo" else {}, *changes):
        made = merge(made, change)
    made["run"]["output"] = str(output)
    return made


def go(folder, command, made, size, *flags, points=None):
    """Run a command in `size` processes; return exit codes and what each printed."""
    name = f"{command}-{time.monotonic_ns()}"
    ranks = Ranks([command, write(folder / f"{name}.yaml", made), *flags], folder / name, size, points)
    return ranks.wait(), ranks.said()


@pytest.fixture(scope="module")
def whole(project):
    """Runs of one process, by variant."""
    done = {}

    def get(variant, command="ppo"):
        key = command, variant
        if key not in done:
            done[key] = project / f"whole-{command}-{variant}"
            made = settings(project, done[key], VARIANTS.get(variant, {}), command=command)
            assert go(project, command, made, 1)[0] == [0]
        return done[key]

    return get


@pytest.mark.parametrize("variant", quick_first(VARIANTS, 1))
def test_two_processes_give_the_bits_of_one(project, whole, tmp_path, variant):
    codes, said = go(tmp_path, "ppo", settings(project, tmp_path / "two", VARIANTS[variant]), 2)
    assert codes == [0, 0], said
    assert_same(tmp_path / "two", whole(variant), ALIKE)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    waited = [line["parallel/waiting"] for line in lines if line["step"]]  # 0 is the evaluation before training
    assert all(0 < share < 1 for share in waited)
    assert "Saved in" in said[0]
    assert said[1] == ""  # one speaks


WHOLE_BATCHES = {"microbatch_size": 4, "data": {"eval_fraction": 1 / 3}}  # 16 pairs in batches of 8


def test_heads_on_states_in_two_processes(project, whole, tmp_path):
    """The states are gathered as scores are, and rank 0 alone reads the heads."""
    features, heads = tmp_path / "features", tmp_path / "heads"
    assert main(["features", str(whole("fp32")), str(project / "pairs.jsonl"), "--output", str(features)]) == 0
    assert (
        main(["heads", str(features), "--output", str(heads), "--kind", "linear", "--members", "2", "--held-out", "0.3"]) == 0
    )
    source = {"kind": "head", "target": str(heads), "aggregate": "lcb", "aggregate_coef": 0.5}
    for size in (1, 2):
        made = settings(project, tmp_path / f"run-{size}", {"reward": {"sources": [source]}, "steps": 2})
        codes, said = go(tmp_path, "ppo", made, size)
        assert codes == [0] * size, said
    assert_same(tmp_path / "run-2", tmp_path / "run-1", ALIKE)
    lines = (tmp_path / "run-2" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reward/head/spread"] > 0 for line in lines[1:])  # after the evaluation before training


def test_joint_sft_gives_the_bits_of_one(project, whole, tmp_path):
    made = settings(project, tmp_path / "two", WHOLE_BATCHES, command="sft")
    codes, said = go(tmp_path, "sft", made, 2)
    assert codes == [0, 0], said
    one = settings(project, tmp_path / "one", WHOLE_BATCHES, command="sft")
    assert go(tmp_path, "sft", one, 1)[0] == [0]
    assert_same(tmp_path / "two", tmp_path / "one", ("parallel", "eval", "loss/reward", "train"))
    assert (tmp_path / "two/sft").is_dir()


def near(run, other, tolerance):
    """Check that two runs ended with numbers that are the same up to the order of sums."""
    files = [path.relative_to(run) for path in run.glob("*/adapter_model.safetensors")] + ["heads.safetensors"]
    assert len(files) > 2
    for file in files:
        found, expected = load_file(run / file), load_file(other / file)
        for name, tensor in expected.items():
            numpy.testing.assert_allclose(found[name], tensor, rtol=0, atol=tolerance, err_msg=f"{file} {name}")


def test_three_processes_and_pieces_of_all_kinds(project, tmp_path):
    """Six rows in uneven pieces over three processes: the same but for the order of sums.

    Where a gradient is about AdamW's eps, its last bits are a part of a step: a hundredth of the learning rate is allowed.
    """
    changes = {
        "rollout": {"batch_size": 6, "generation_batch_size": None},
        "minibatch_size": 3,
        "microbatch_size": 1,
        "steps": 1,
        "optimizer": {"learning_rate": 1e-3},
    }
    for size in (1, 3):
        codes, said = go(tmp_path, "ppo", settings(project, tmp_path / str(size), changes), size)
        assert codes == [0] * size, said
    near(tmp_path / "3", tmp_path / "1", 1e-5)


@pytest.mark.parametrize("trunk", [pytest.param(1, marks=pytest.mark.long)])
def test_a_trunk_without_its_cache(project, tmp_path, trunk):
    for size in (1, 2):
        codes, said = go(tmp_path, "ppo", settings(project, tmp_path / str(size), {"model": {"trunk_layers": trunk}}), size)
        assert codes == [0] * size, said
    near(tmp_path / "2", tmp_path / "1", 1e-5)


SHARED_OUT = {"model": {"shard_base": True}}


@pytest.mark.parametrize("quantization", ["nf4", pytest.param(None, marks=pytest.mark.long)])
def test_a_base_that_is_shared_out(project, tmp_path, quantization):
    """Uneven pieces, answers of many lengths, drift measured: the same but for the order of sums."""
    uneven = {
        "model": {"quantization": quantization},
        "microbatch_tokens": 14,
        "microbatch_size": 3,
        "rollout": {"generation_batch_size": 3, "score_batch_size": 3, "measure_drift": True},
        "steps": 1,
        "optimizer": {"learning_rate": 1e-3},
    }
    for size, more in ((1, {}), (2, SHARED_OUT)):
        codes, said = go(tmp_path, "ppo", settings(project, tmp_path / str(size), uneven, more), size)
        assert codes == [0] * size, said
    near(tmp_path / "2", tmp_path / "1", 2e-5)
    one, two = ((tmp_path / name / "samples.jsonl").read_text() for name in "12")
    assert [json.loads(line)["response"] for line in one.splitlines()] == [
        json.loads(line)["response"] for line in two.splitlines()
    ]


def test_joint_sft_on_a_base_that_is_shared_out(project, tmp_path):
    for size, more in ((1, {}), (2, SHARED_OUT)):
        made = settings(project, tmp_path / str(size), {"epochs": 1, "microbatch_size": 3}, more, command="sft")
        codes, said = go(tmp_path, "sft", made, size)
        assert codes == [0] * size, said
    near_sft = load_file(tmp_path / "1/sft/adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "2/sft/adapter_model.safetensors").items():
        numpy.testing.assert_allclose(tensor, near_sft[name], rtol=0, atol=2e-5, err_msg=name)


def test_a_stop_and_a_lack_of_memory_where_others_wait_in_a_pass(project, tmp_path):
    """A stop is heard once a batch is done; memory that runs out ends all, with a line that says why."""
    made = settings(project, tmp_path / "run", SHARED_OUT, {"reward": {"sources": SLOW}})
    ranks = Ranks(["ppo", write(tmp_path / "run.yaml", made)], tmp_path / "stopped")
    wait_for_more(tmp_path / "run/log.txt", 0, ranks.processes[1])
    time.sleep(1)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.said()
    assert ranks.said()[0].count("Stopped. Go on with:") == 1
    codes, said = go(tmp_path, "ppo", made, 2, "--resume", points={1: ("memory", 3)})
    assert codes == [1, 1], said
    assert "with model.shard_base others are in the middle of the same pass" in said[1]
    assert go(tmp_path, "ppo", made, 2, "--resume")[0] == [0, 0]


SLOW = [{"kind": "function", "target": "tests.faults.light:slow"}]


def test_a_run_goes_on_with_another_number_of_processes(project, whole, tmp_path):
    """Two, then one, then two again; from checkpoints that rank 0 wrote."""
    for size, steps in ((2, 2), (1, 4), (2, 6)):
        codes, said = go(tmp_path, "ppo", settings(project, tmp_path / "run", {"steps": steps}), size, "--resume")
        assert codes == [0] * size, said
    assert_same(tmp_path / "run", whole("fp32"), (*ALIKE, "eval"))
    assert "WORLD_SIZE was 1, is 2" in (tmp_path / "run/log.txt").read_text()


def wait_for_more(log, size, process):
    """Wait until a file is larger than that, or there is nobody to write it."""
    deadline = time.monotonic() + 60
    while (not log.exists() or log.stat().st_size <= size) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_stops_all_and_the_run_goes_on(project, whole, tmp_path, rank):
    """SIGTERM to one process: all end with 0 and a checkpoint, wherever they were."""
    made = settings(project, tmp_path / "run")
    stops = 0
    for attempt in range(6):
        log = tmp_path / "run/log.txt"
        before = log.stat().st_size if log.exists() else 0
        ranks = Ranks(["ppo", write(tmp_path / "run.yaml", made), "--resume"], tmp_path / str(attempt))
        wait_for_more(log, before, ranks.processes[rank])  # they have met by then
        time.sleep(0.15 * attempt)
        if ranks.processes[rank].is_alive():
            os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        assert ranks.wait() == [0, 0], ranks.said()
        said = ranks.said()
        if "Saved in" in said[0]:
            break
        stops += 1
        assert said[0].count("Stopped. Go on with:") == 1
        assert said[1] == ""
    assert stops
    if "Saved in" not in said[0]:
        assert go(tmp_path, "ppo", made, 2, "--resume")[0] == [0, 0]
    assert_same(tmp_path / "run", whole("fp32"), ALIKE)


MOST = {"rollout": 30, "score": 9, "update": 20, "write": 60}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_ranks(project, whole, tmp_path, kills):
    """A process dies without a word, at any point: the others end and name it, and the run goes on to the same bits."""
    rng = random.Random(kills)
    done, finished = 0, 0
    while done < kills or not finished:
        made = settings(project, tmp_path / f"run{finished}")
        rank = rng.randrange(2)
        place = rng.choice([name for name in MOST if rank == 0 or name != "write"])
        points = {rank: (place, rng.randint(1, MOST[place]))} if done < kills else None
        codes, said = go(tmp_path, "ppo", made, 2, "--resume", points=points)
        if codes == [0, 0]:
            assert_same(tmp_path / f"run{finished}", whole("fp32"), ALIKE)
            finished += 1
            continue
        assert codes[rank] == -signal.SIGKILL, (points, codes, said)
        assert codes[1 - rank] == 1, (points, codes, said)
        (line,) = [line for line in said[1 - rank].splitlines() if "ended without a word" in line]
        assert line.startswith(f"rank {rank} (process ")
        done += 1


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_runs_out_in_one_process(project, tmp_path, rank, monkeypatch):
    """All halve what they do at once, and the run ends with the same numbers."""
    short = settings(project, tmp_path / "run", {"steps": 2, "rollout": {"generation_batch_size": 4, "score_batch_size": 4}})
    short["reward"]["sources"] = [{"kind": "function", "target": "tests.training:count_low_tokens"}]
    plain = json.loads(json.dumps(short))
    plain["run"]["output"] = str(tmp_path / "plain")
    assert go(tmp_path, "ppo", plain, 1)[0] == [0]
    codes, said = go(tmp_path, "ppo", short, 2, points={rank: ("memory", 3)})
    assert codes == [0, 0], said
    log = (tmp_path / "run/log.txt").read_text()
    assert "out of memory" in log
    assert "microbatch_size=1, which stays" in log
    near(tmp_path / "run", tmp_path / "plain", 1e-6)


def test_a_reward_function_that_fails_is_said_once(project, tmp_path):
    made = settings(project, tmp_path / "run")
    made["reward"]["sources"] = [{"kind": "function", "target": "tests.faults.light:fails"}]
    codes, said = go(tmp_path, "ppo", made, 2)
    assert codes == [1, 1]
    assert "function tests.faults.light:fails" in said[0].splitlines()[-1]
    assert said[1] == ""
    assert json.loads((tmp_path / "run/state.json").read_text())["state"] == "failed"


def test_rank_0_cannot_write(project, tmp_path):
    """What rank 0 alone finds out ends the others too, and is said once."""
    (tmp_path / "file").write_text("")
    codes, said = go(tmp_path, "ppo", settings(project, tmp_path / "file"), 2)
    assert codes == [2, 2]
    assert [len(text.splitlines()) for text in said] == [1, 0]


def test_a_world_that_does_not_divide(project, tmp_path):
    codes, said = go(tmp_path, "ppo", settings(project, tmp_path / "run"), 3)
    assert codes == [2, 2, 2]
    lines = [line for text in said for line in text.splitlines() if "WORLD_SIZE" in line]
    assert lines == [
        "WORLD_SIZE=3 does not divide rollout.batch_size=8, so processes would wait for others; start 1, 2, 4 or 8 of them, or "
        "choose a multiple of 3."
    ]
    assert not (tmp_path / "run").exists()


def test_one_gpu_for_several_processes_is_refused(project, tmp_path):
    codes, said = go(tmp_path, "ppo", settings(project, tmp_path / "run", {"model": {"device": "cuda:0"}}), 2)
    assert codes == [2, 2]
    assert said == ["model.device='cuda:0' puts 2 processes on one GPU; use auto, which gives each its own.\n", ""]
