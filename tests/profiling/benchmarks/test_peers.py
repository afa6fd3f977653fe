"""The peer benchmark: its arithmetic, its conversation with workers, our own workers, and load. Nothing is installed."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks.peers import environments, load, run
from hydra_ppo.profiling.benchmarks.peers.floor import attention, layer_linears, multiply_adds, shares
from hydra_ppo.profiling.benchmarks.peers.load import GRAIN, REPEATS, Reading, between, undisturbed
from hydra_ppo.profiling.benchmarks.peers.processes import Worker, WorkerError
from hydra_ppo.profiling.benchmarks.peers.results import MIB, Result, collect, floor_table, median_ratio, medians, table, write
from hydra_ppo.profiling.benchmarks.peers.workloads import (
    LORA_ALPHA,
    LORA_RANK,
    WORKLOADS,
    Workload,
    by_default,
    contestants,
    matmul,
)

FOLDER = Path(run.__file__).parent
TINY = WORKLOADS["tiny"]

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


def report(seconds: list[float], peak: int, phases: list[dict[str, float]] | None = None) -> dict:
    return {
        "peak_bytes": peak,
        "static_bytes": peak // 2,
        "versions": {"torch": "2"},
        "seconds": seconds,
        "phases": phases or [],
        "disturbed": [False for _ in seconds],
    }


def results(rates: dict[str, dict[str, float]] | None = None, **reports: dict) -> list[Result]:
    known = contestants(TINY)
    named = {name.replace("_", "-"): found for name, found in reports.items()}
    return collect(TINY, [known[name] for name in named], named, rates or {}, threads=2)


# -- results -------------------------------------------------------------------------------------------------------------


def test_ratio_is_taken_round_by_round():
    # 2/1, 30/10, 8/2 are 2, 3, 4. The ratio of the medians, 8/2, would let the slow second round decide.
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
    assert median_ratio([], []) is None


def test_medians_by_name():
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 8.0}, {"a": 2.0, "b": 1.0}]) == {"a": 2.0, "b": 8.0}
    assert medians([]) is None


def test_results_compare_with_ours_and_with_the_peer():
    ours, peer, half = results(
        hydra=report([1.0, 2.0, 3.0], 10 * MIB),
        trl112_lora=report([2.0, 8.0, 9.0], 25 * MIB),
        hydra_trunk1_bf16=report([0.5, 1.0, 3.0], 5 * MIB),
    )
    assert (ours.seconds_per_update, ours.seconds_ratio, ours.peak_ratio) == (2.0, 1.0, 1.0)
    assert ours.speedup == 3.0  # of 2/1, 8/2, 9/3
    assert (peer.seconds_per_update, peer.seconds_ratio, peer.speedup, peer.peak_ratio) == (8.0, 3.0, 1.0, 2.5)
    assert half.speedup == 4.0  # of 2/0.5, 8/1, 9/3
    assert half.responses_per_second == 4.0  # rows of the tiny workload in its median second
    assert (half.trunk_layers, half.dtype, half.static_bytes) == (1, "bf16", 5 * MIB // 2)
    assert (peer.trunk_layers, peer.dtype, peer.threads) == (0, "fp32", 2)


def test_without_ours_or_without_rounds_there_is_no_ratio():
    (alone,) = results(trl112_full=report([2.0, 4.0], MIB))
    assert (alone.seconds_ratio, alone.speedup, alone.peak_ratio) == (None, None, None)
    (peaks,) = results(hydra=report([], MIB))
    assert (peaks.seconds_per_update, peaks.responses_per_second, peaks.seconds_ratio, peaks.peak_ratio) == (None,) * 3 + (1.0,)


def test_fields_of_the_file(tmp_path: Path):
    write(results(hydra=report([1.0, 2.0], 3 * MIB)), tmp_path / "new" / "peers.json")
    (row,) = json.loads((tmp_path / "new" / "peers.json").read_text())
    asked = ("name", "workload", "trunk_layers", "dtype", "seconds_per_update", "responses_per_second")
    assert tuple(row)[:8] == (*asked, "peak_bytes", "static_bytes")
    assert tuple(row.values())[:8] == ("hydra", "tiny", 0, "fp32", 1.5, 4 / 1.5, 3 * MIB, 3 * MIB // 2)
    assert {workload.name for workload in WORKLOADS.values()} == {"tiny", "W1", "W2"}


def test_table():
    ours, peer = results(hydra=report([1.0, 2.0], 3 * MIB), trl112_lora=report([4.0, 4.0], 6 * MIB))
    (untimed,) = results(trl011_multi=report([], 2 * MIB))
    shown = table([replace(ours, disturbed=[False, True]), peer, untimed], "")
    columns = [list(column.cells) for column in shown.columns]
    assert columns[:4] == [
        ["hydra", "trl112-lora", "trl011-multi"],
        ["1.500 *", "4.000", "-"],
        ["2.667", "1.000", "-"],
        ["1.00", "3.00", "-"],  # of 4/1 and 4/2
    ]
    assert columns[4:] == [["3.00", "1.00", "-"], ["3.0", "6.0", "2.0"], ["1.00", "2.00", "-"], ["1.5", "3.0", "1.0"]]
    assert "* disturbed" in str(shown.caption)
    assert "does not say" not in str(shown.caption)
    assert "* disturbed" not in str(table([peer], "").caption)
    assert "does not say" in str(table([replace(peer, disturbed=[None, None])], "").caption)


def test_floor_beside_the_time_taken():
    work = multiply_adds(TINY, 1)
    rates = {"fp32": {"torch.matmul": 1e6, "products.linear": 2e6}}
    phases = [{"rollout": work["rollout"] / 5e5, "score": 9.0, "update": 1.0}] * 3
    (found, peer) = results(rates, hydra_trunk1=report([30.0] * 3, MIB, phases), trl112_full=report([1.0] * 3, MIB))
    assert peer.floor is None
    assert peer.phase_seconds is None
    assert found.floor is not None
    assert found.floor.multiply_adds == work
    # The rollout ran at half the rate of torch.matmul and at a quarter of the best kernel's.
    assert found.floor.share_torch_matmul["rollout"] == pytest.approx(0.5)
    assert found.floor.share_best_kernel["rollout"] == pytest.approx(0.25)
    assert found.floor.share_torch_matmul["update"] == pytest.approx(work["update"] / 1e6)
    shown = floor_table([found, peer], "")
    assert shown is not None
    first = [next(iter(column.cells)) for column in shown.columns]
    assert (first[:2], first[4:]) == (["hydra-trunk1", "rollout"], ["50%", "25%"])
    assert floor_table([peer], "") is None


# -- floor ---------------------------------------------------------------------------------------------------------------

SHAPE = Workload("x", 4, 6, 2, 2, 1, 10, rows=1, prompt_tokens=1, response_tokens=2, epochs=1, microbatch=1)
"""Two heads of 2, one of them for keys and values; rows of 3 tokens."""


def test_parts_by_hand():
    assert [layer.frozen for layer in layer_linears(SHAPE)] == [16, 8, 8, 16, 24, 24, 24]  # 120 together
    assert [layer.lora(1) for layer in layer_linears(SHAPE)] == [8, 6, 6, 8, 10, 10, 10]  # 58
    # A row of 3 has 1 + 2 + 3 = 6 pairs, each 4 for its score and 4 for its value.
    assert (attention(SHAPE, 3), attention(SHAPE, 2)) == (48, 24)


def test_phases_by_hand():
    assert multiply_adds(SHAPE, 0, rank=1) == {
        # 2 layers of 2 tokens, their LoRA, the head (4 x 10) on 2 tokens
        "rollout": 2 * (2 * 120 + 24) + 2 * 2 * 58 + 80,
        # reference with the head; critic with LoRA
        "score": 2 * (3 * 120 + 48) + 80 + 2 * (3 * 120 + 48) + 2 * 3 * 58,
        "update": 2 * (816 + 348)  # forward passes of actor and critic
        + 2 * 2 * 3 * 120  # gradients of the inputs of frozen weights,
        - 2 * 3 * (16 + 8 + 8)  # but not of the first q, k and v
        + 2 * 2 * 2 * 48  # attention: twice its forward pass
        + 2 * 2 * 348  # LoRA: A, B, between them, input,
        - 2 * 3 * 3 * 4  # but not the first inputs of q, k and v
        + 2 * 80,  # the actor's head, forward and gradient
    }


def test_trunk_runs_in_rollout_and_first_scoring_pass_only():
    assert multiply_adds(SHAPE, 1, rank=1) == {
        "rollout": 2 * (2 * 120 + 24) + 2 * 58 + 80,
        "score": 2 * (3 * 120 + 48) + 80 + (3 * 120 + 48) + 3 * 58,
        "update": 2 * (408 + 174 + 360 - 96 + 96 + 348 - 36) + 2 * 80,
    }


def test_work_grows_with_rows_and_epochs():
    once, more = multiply_adds(SHAPE, 1), multiply_adds(replace(SHAPE, rows=3, epochs=2), 1)
    assert more == {"rollout": 3 * once["rollout"], "score": 3 * once["score"], "update": 6 * once["update"]}


def test_shares_by_hand():
    found = shares({"rollout": 10, "score": 20, "update": 70}, {"rollout": 2.0, "score": 2.0, "update": 16.0}, rate=10.0)
    # 1 of 2, 2 of 2 and 7 of 16 seconds; 10 of 20
    assert found == {"rollout": 0.5, "score": 1.0, "update": 0.4375, "whole": 0.5}


# -- load ----------------------------------------------------------------------------------------------------------------

STAT = "cpu  100 10 30 800 40 5 15 7 60 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 5 0\n"
PROCESS = "42 (a (b) c) S 1 42 42 0 -1 4194304 900 0 3 0 250 33 0 0 20 0 3 0 100 1000 10"


def test_accounts_are_read():
    # user 100, nice 10, system 30, interrupts 5 and 15; idle 800 and 40; the 60 of guests are in user
    assert load.machine_ticks(STAT) == (1007, 160, 7)
    assert load.process_ticks(PROCESS) == 250 + 33


def test_load_by_hand():
    before = Reading(total=1000, busy=500, steal=0, own=100)
    found = between(before, Reading(total=2000, busy=1300, steal=20, own=850))
    assert (found.others, found.steal, found.disturbed) == (0.05, 0.02, False)  # 800 busy, 750 of them its own
    assert between(before, Reading(2000, 1300, 20, 849)).disturbed  # one tick more of others
    assert between(before, Reading(2000, 1250, 51, 850)).disturbed  # stolen
    assert between(before, Reading(2000, 1200, 0, 850)).others == 0  # ticks are rounded; never below 0
    # In a short turn a few ticks are nobody's fault.
    assert not between(before, Reading(1010, 500 + GRAIN, 0, 100)).disturbed
    assert between(before, Reading(1010, 501 + GRAIN, 0, 100)).disturbed


class Machine:
    """Writes accounts in which turns of 1000 ticks pass, others using given numbers of them."""

    def __init__(self, folder: Path, others: list[int]) -> None:
        self.folder, self.others = folder, others
        self.total = self.busy = self.own = self.turns = 0
        (folder / "42").mkdir()
        self._write()

    def turn(self) -> int:
        self.total += 1000
        self.own += 500
        self.busy += 500 + self.others[self.turns]
        self.turns += 1
        self._write()
        return self.turns

    def _write(self) -> None:
        (self.folder / "stat").write_text(f"cpu  {self.busy} 0 0 {self.total - self.busy} 0 0 0 0 0 0\n")
        fields = " ".join(["0"] * 10)
        (self.folder / "42" / "stat").write_text(f"42 (x) S {fields} {self.own} 0 0\n")


@pytest.mark.parametrize(
    ("others", "turns", "disturbed"),
    [([10], 1, False), ([200, 300, 10], 3, False), ([200] * 9, REPEATS + 1, True)],
    ids=["quiet", "two repeats", "never quiet"],
)
def test_disturbed_turn_is_taken_again(tmp_path, others, turns, disturbed):
    machine = Machine(tmp_path, others)
    said: list[str] = []
    found, seen = undisturbed(machine.turn, 42, said.append, tmp_path)
    assert seen is not None
    assert (found, machine.turns, seen.disturbed) == (turns, turns, disturbed)
    assert len(said) == turns - 1
    assert seen.others == others[turns - 1] / 1000


def test_without_accounts_a_turn_is_taken_once(tmp_path):
    assert undisturbed(lambda: 7, 42, pytest.fail, tmp_path / "none") == (7, None)


# -- contestants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "trunk"), [("w1", 4), ("w2", 2), ("tiny", 1)])
def test_every_contestant_has_its_script(workload, trunk):
    known = contestants(WORKLOADS[workload])
    peers = ["trl112-full", "trl112-lora", "trl011-multi"]
    fp32 = ["hydra", f"hydra-trunk{trunk}", *peers[:2], "trl112-patched", peers[2]]
    bf16 = ["hydra-bf16", f"hydra-trunk{trunk}-bf16", *(f"{name}-bf16" for name in peers)]
    assert list(known) == [*fp32, *bf16, "hydra-plain"]
    for name, contestant in known.items():
        assert (FOLDER / contestant.script).is_file()
        assert contestant.dtype == ("bf16" if name.endswith("bf16") else "fp32")
        assert contestant.trunk_layers == (trunk if "trunk" in name else 0)
    assert (FOLDER / matmul("bf16").script).is_file()
    for name in ("hydra-bf16", "trl112-full-bf16", "trl112-lora-bf16", "trl011-multi-bf16"):  # the same but for the type
        assert known[name].options == known[name.removesuffix("-bf16")].options


def test_who_takes_part_by_default():
    assert by_default(WORKLOADS["w1"]) == [name for name in contestants(WORKLOADS["w1"]) if name != "hydra-plain"]
    assert by_default(WORKLOADS["w2"]) == ["hydra", "hydra-trunk2", "trl112-full", "trl112-lora", "trl011-multi"]


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_micro_batches_fill_the_minibatch(workload):
    assert workload.rows % workload.microbatch == 0
    assert {len(prompt) for prompt in workload.prompts(3)} == {workload.prompt_tokens}
    assert workload.prompts(3) == workload.prompts(3)


def test_choice_of_contestants():
    both = [WORKLOADS["w1"], WORKLOADS["w2"]]

    def names(workloads: list[Workload], only: list[str]) -> list[list[str]]:
        return [[c.name for c in found] for found in run.choose(workloads, only).values()]

    assert names([TINY], ["trl011-multi", "hydra"]) == [["hydra", "trl011-multi"]]
    assert names(both, ["hydra", "hydra-trunk2"]) == [["hydra"], ["hydra", "hydra-trunk2"]]
    assert [len(found) for found in names(both, [])] == [11, 5]
    with pytest.raises(ConfigError, match=r"only='hydra-trunk4' is no contestant of tiny; choose among hydra, hydra-trunk1"):
        run.choose([TINY], ["hydra-trunk4"])
    with pytest.raises(ConfigError, match="only=hydra-trunk4 leaves nobody for W2"):
        run.choose(both, ["hydra-trunk4"])


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


def test_worker_knows_its_process(fake):
    assert (Path("/proc") / str(fake.pid)).exists() or not Path("/proc").exists()


def test_phases_of_our_trainer_add_up(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # the workers import their neighbours by bare name
    phase_seconds = importlib.import_module("hydra_worker").phase_seconds
    marks = [("rollout", 1.0), ("score", 4.0), ("update-actor", 4.5), ("update-critic", 6.0), ("optimizer", 7.0)]
    assert phase_seconds(marks, 7.25) == {"rollout": 3.0, "score": 0.5, "update": 2.75}


def test_our_workers_do_the_tiny_update(tmp_path: Path, capsys):
    output = tmp_path / "peers.json"
    arguments = ["--workload", "tiny", "--rounds", "1", "--threads", "1", "--only", "hydra", "--output", str(output)]
    assert run.main(arguments) == run.DONE
    (row,) = json.loads(output.read_text())
    assert len(row["seconds"]) == len(row["disturbed"]) == 1
    assert row["responses_per_second"] == pytest.approx(TINY.rows / row["seconds_per_update"])
    assert row["seconds_ratio"] == row["peak_ratio"] == 1.0
    assert {"python", "torch", "hydra-ppo"} <= row["versions"].keys()
    assert sum(row["phase_seconds"].values()) == pytest.approx(row["seconds_per_update"], rel=0.1)
    assert row["floor"]["multiply_adds"] == multiply_adds(TINY, 0)
    assert row["floor"]["rates"].keys() == {"torch.matmul", "products.linear"}
    assert "hydra" in capsys.readouterr().out
    # Static are the model and the optimizer's state.
    model = HydraModel.from_config(
        LlamaConfig(**TINY.llama()), dtype="fp32", device="cpu", lora=LoraSettings(r=LORA_RANK, alpha=LORA_ALPHA)
    )
    held = 4 * sum(parameter.numel() for parameter in model.parameters())
    moments = 2 * 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Beside them only buffers, step counts and the like: less than a hundredth.
    assert held + moments <= row["static_bytes"] < 1.01 * (held + moments)
    assert row["peak_bytes"] > row["static_bytes"]


def test_spec_announces_every_update_that_may_be_asked_for():
    (contestant,) = run.choose([TINY], ["hydra-trunk1-bf16"])["tiny"]
    spec = run._spec(contestant, TINY, rounds=3, threads=2)
    assert spec["updates"] == 1 + 3 * (1 + REPEATS) + 1
    assert (spec["dtype"], spec["options"], spec["workload"]) == ("bf16", {"trunk_layers": 1}, asdict(TINY))


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
