"""The peer benchmark: its arithmetic, its conversation with workers, and our own worker. Nothing is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.benchmarks.peers import environments, run
from hydra_ppo.profiling.benchmarks.peers.processes import Worker, WorkerError
from hydra_ppo.profiling.benchmarks.peers.results import MIB, collect, median_ratio, table, write
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, contestants

FAKE = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
seconds = []
for line in sys.stdin:
    command = line.strip()
    if command == "update":
        seconds.append(float(len(seconds)))
        print(json.dumps({"seconds": seconds[-1]}), flush=True)
    elif command == "chatter":
        print("epoch 1 of 4", flush=True)
    elif command == "die":
        print("Traceback", "ValueError: no such thing", sep="\\n", file=sys.stderr)
        sys.exit(3)
    elif command == "quit":
        print(json.dumps({"seconds": seconds[1:]}), flush=True)
        break
"""


def report(name: str, seconds: list[float], peak: int) -> dict:
    return {
        "name": name,
        "workload": "tiny",
        "dtype": "fp32",
        "seconds": seconds,
        "responses_per_second": 4 / seconds[1] if seconds else None,
        "peak_bytes": peak,
        "versions": {"torch": "2"},
    }


# -- results -------------------------------------------------------------------------------------------------------------


def test_ratio_is_taken_round_by_round():
    # 2/1, 30/10, 8/2 are 2, 3, 4. The ratio of the medians, 8/2, would let the slow second round decide.
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
    assert median_ratio([], []) is None


def test_results_compare_with_ours():
    ours, theirs = collect(
        {"hydra": report("hydra", [1.0, 2.0, 3.0], 10 * MIB), "peer": report("peer", [2.0, 8.0, 9.0], 25 * MIB)}, "hydra", 2
    )
    assert (ours.seconds_median, ours.seconds_ratio, ours.peak_ratio) == (2.0, 1.0, 1.0)
    assert (theirs.seconds_median, theirs.seconds_ratio, theirs.peak_ratio) == (8.0, 3.0, 2.5)
    assert theirs.threads == 2


def test_without_ours_or_without_rounds_there_is_no_ratio():
    (alone,) = collect({"peer": report("peer", [2.0, 4.0], MIB)}, "hydra", 1)
    assert (alone.seconds_ratio, alone.peak_ratio) == (None, None)
    (peaks,) = collect({"hydra": report("hydra", [], MIB)}, "hydra", 1)
    assert (peaks.seconds_median, peaks.seconds_ratio, peaks.peak_ratio) == (None, None, 1.0)


def test_table_and_file(tmp_path: Path):
    timed = collect({"hydra": report("hydra", [1.0, 2.0], 3 * MIB)}, "hydra", 1)
    results = timed + collect({"peer": report("peer", [], 6 * MIB)}, "hydra", 1)
    columns = [list(column.cells) for column in table(results, "").columns]
    assert columns == [["hydra", "peer"], ["1.500", "-"], ["2.000", "-"], ["1.00", "-"], ["3.0", "6.0"], ["1.00", "-"]]
    write(results, tmp_path / "new" / "peers.json")
    rows = json.loads((tmp_path / "new" / "peers.json").read_text())
    assert [row["name"] for row in rows] == ["hydra", "peer"]
    assert rows[0]["peak_bytes"] == 3 * MIB


# -- contestants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "trunk"), [("w1", "hydra-trunk4"), ("w2", "hydra-trunk2"), ("tiny", "hydra-trunk1")])
def test_every_contestant_has_its_script(workload, trunk):
    known = contestants(WORKLOADS[workload])
    assert list(known) == ["hydra", trunk, "trl112-full", "trl112-lora", "trl112-patched", "trl011-multi"]
    for contestant in known.values():
        assert (Path(run.__file__).parent / contestant.script).is_file()


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_micro_batches_fill_the_minibatch(workload):
    assert workload.rows % workload.microbatch == 0
    assert {len(prompt) for prompt in workload.prompts(3)} == {workload.prompt_tokens}
    assert workload.prompts(3) == workload.prompts(3)


def test_choice_of_contestants():
    tiny = WORKLOADS["tiny"]
    assert [c.name for c in run.choose(tiny, ["trl011-multi", "hydra"])] == ["hydra", "trl011-multi"]
    assert len(run.choose(tiny, [])) == 6
    with pytest.raises(ConfigError, match=r"only='hydra-trunk4' is no contestant of tiny; choose among hydra, hydra-trunk1"):
        run.choose(tiny, ["hydra-trunk4"])


# -- workers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    with Worker("fake", [sys.executable, str(script)], {}) as worker:
        yield worker


def test_worker_answers_each_command(fake):
    assert fake.ask("update") == {"seconds": 0.0}
    assert fake.ask("update") == {"seconds": 1.0}
    assert fake.ask("quit") == {"seconds": [1.0]}


def test_dead_worker_is_one_line_with_the_end_of_its_stderr(fake):
    with pytest.raises(WorkerError) as caught:
        fake.ask("die")
    message = str(caught.value)
    assert message.startswith("fake died at 'die' with exit code 3: Traceback ValueError: no such thing; ")
    assert "\n" not in message
    with pytest.raises(WorkerError, match="died at 'update'"):
        fake.ask("update")


def test_worker_that_chatters_is_refused(fake):
    with pytest.raises(WorkerError, match="answered 'epoch 1 of 4' to 'chatter', which is not JSON"):
        fake.ask("chatter")


def test_worker_that_cannot_start():
    with pytest.raises(WorkerError, match=r"died at 'building' with exit code 1: .*ModuleNotFoundError"):
        Worker("broken", [sys.executable, "-c", "import no_such_module"], {})


def test_our_worker_does_the_tiny_update(tmp_path: Path):
    output = tmp_path / "peers.json"
    arguments = ["--workload", "tiny", "--rounds", "1", "--threads", "1", "--only", "hydra", "--output", str(output)]
    assert run.main(arguments) == run.DONE
    (row,) = json.loads(output.read_text())
    assert len(row["seconds"]) == 1
    assert row["responses_per_second"] == pytest.approx(WORKLOADS["tiny"].rows / row["seconds_median"])
    assert row["seconds_ratio"] == row["peak_ratio"] == 1.0
    # The base alone: two times 500 x 64 of embeddings and head, in fp32.
    assert row["peak_bytes"] > 2 * 500 * 64 * 4
    assert {"python", "torch", "hydra-ppo"} <= row["versions"].keys()


@pytest.mark.parametrize("arguments", [["--rounds", "-1"], ["--threads", "0"], ["--only", "nobody"]])
def test_bad_input_exits_with_2(arguments, tmp_path, capsys):
    assert run.main(["--workload", "tiny", "--output", str(tmp_path / "x.json"), *arguments]) == run.BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


# -- environments --------------------------------------------------------------------------------------------------------


def test_own_environment_needs_nothing(tmp_path: Path):
    found = environments.prepare(tmp_path / "peers", ["hydra"], pytest.fail)
    assert found["hydra"].python == sys.executable
    assert not (tmp_path / "peers").exists()
    with pytest.raises(ConfigError, match="environment='trl999' is not known"):
        environments.prepare(tmp_path, ["trl999"], pytest.fail)


def test_an_environment_is_built_once(tmp_path: Path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", commands.append)
    lines: list[str] = []
    first = environments.prepare(tmp_path, ["trl112", "trl011"], lines.append)
    _, _, torch_alone, the_rest = commands  # the first installs trl112, the second makes the environment of trl011
    assert torch_alone[-2:] == ["--disable-pip-version-check", environments.TORCH]
    assert environments.TORCH in the_rest
    assert lines
    commands.clear()
    assert environments.prepare(tmp_path, ["trl112", "trl011"], pytest.fail) == first
    assert commands == []
    assert first["trl112"].variables["PYTHONPATH"].startswith(str(tmp_path))


def test_an_interrupted_installation_is_done_again(tmp_path: Path, monkeypatch):
    def fail(command):
        raise environments.InstallError("no index")

    monkeypatch.setattr(environments, "_run", fail)
    with pytest.raises(environments.InstallError):
        environments.prepare(tmp_path, ["trl112"], lambda line: None)
    done: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", done.append)
    environments.prepare(tmp_path, ["trl112"], lambda line: None)
    assert len(done) == 1
