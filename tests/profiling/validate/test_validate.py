"""The validation that GPUs get, on a CPU: what it records, what it does with a part that fails, how it shares out its time."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.record import PHASES, Peak, Profile
from hydra_ppo.profiling.validate import run as validate
from hydra_ppo.profiling.validate.memory import compare_phase
from hydra_ppo.profiling.validate.parts import Budget, NotRun, Part, require, run_parts, shortened, verdict
from hydra_ppo.profiling.validate.roles import BF16_TOLERANCES, check_roles
from hydra_ppo.profiling.workload import Workload

CPU = torch.device("cpu")
GOOD = {"passed": True, "summary": "as it should be"}

NO_BITSANDBYTES = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "bitsandbytes" else find_spec(name, *rest)
sys.meta_path.insert(0, Missing())
import torch
from hydra_ppo.profiling.validate import run as validate
torch.set_num_threads(1)
every = validate.make_parts
validate.make_parts = lambda device: [part for part in every(device) if part.name.startswith(("roles nf4", "memory tiny-2"))]
sys.exit(validate.main(["--device", "cpu", "--output", sys.argv[1]]))
"""


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def part(name="part", result=GOOD, weight=1.0, least=0.0, takes=0.0, clock=None, shares=None):
    def run(seconds):
        if shares is not None:
            shares.append(seconds)
        if clock is not None:
            clock.now += takes
        if isinstance(result, Exception):
            raise result
        return result

    return Part(name, run, weight, least)


def test_everything_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "new" / "cpu.json"
    assert validate.main(["--device", "cpu", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["passed"] is True
    assert found["device"] == {"type": "cpu", "name": "cpu", "attention": "sdpa"}
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "bitsandbytes", "flash-attn"} < set(found["versions"])
    assert found["budget_seconds"] == validate.BUDGET > found["seconds"] > sum(p["seconds"] for p in found["parts"].values())
    parts = found["parts"]
    assert [name.split()[0] for name in parts] == [
        *(*["roles"] * 2, *["memory"] * 2, *["speed"] * 2, "generate", "trl", "trl", "tests"),
    ]

    for name in ("roles bf16", "roles nf4"):
        for run in ("checkpointing_on", "checkpointing_off"):
            assert all(parts[name][run][key] <= limit for key, limit in BF16_TOLERANCES.items())
    assert parts["roles bf16"]["rounding"]["separate"]["logprobs"] > 0
    for name in ("memory tiny-2 bf16", "memory tiny-2 nf4"):
        memory = parts[name]
        assert set(memory["phases"]) == set(PHASES)
        assert memory["peak"]["tracked_bytes"] == max(memory["phases"][phase]["tracked_bytes"] for phase in PHASES[1:])
        assert memory["peak"]["allocated_bytes"] is None
        assert memory["judged_by"] == "simulated_to_tracked"
        assert memory["settings"]["response"] == memory["response_asked_for"] == 8
        assert set(memory["attention_kernels"]) == {"load", *PHASES[1:5]}
    for name in ("speed tiny-2 bf16", "speed tiny-3 nf4"):
        speed = parts[name]
        assert set(speed["phases"]) == set(PHASES[1:])
        rollout = speed["phases"]["rollout"]
        assert rollout["response_tokens_per_second"] * rollout["seconds"] == pytest.approx(4 * 8)
        assert rollout["tokens_per_second"] * rollout["seconds"] == pytest.approx(4 * (24 + 8))
        assert speed["step"]["seconds"] == pytest.approx(sum(phase["seconds"] for phase in speed["phases"].values()))
    shown = capsys.readouterr()
    assert "6/10 speed tiny-3 nf4" in shown.err
    beside = parts["generate tiny-2 bf16"]
    assert beside["ratio_merged"] > 0
    assert beside["ratio"] == pytest.approx(
        beside["response_tokens_per_second"]["hydra"] / beside["response_tokens_per_second"]["generate"]
    )
    peer = parts["trl tiny-2 bf16"]
    assert peer["hydra"]["peak_bytes"] is None
    for name in ("hydra", "trl"):
        assert len(peer[name]["seconds_of_each"]) == 3
        assert peer[name]["responses_per_second"] * peer[name]["seconds"] == pytest.approx(4)
    assert parts["trl tiny-2 bf16 within a budget"]["skipped"] == "an equal budget of memory needs a GPU."
    assert parts["tests marked gpu"]["skipped"] == "they need a CUDA device, and torch sees none here."
    table = path.with_suffix(".md").read_text().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(parts)
    assert f"| trl tiny-2 bf16 | passed | {peer['seconds']:.0f} | {peer['summary']} |" in table
    assert "memory tiny-2 bf16" in shown.out


def test_without_bitsandbytes_nf4_is_skipped_and_bf16_still_simulated(tmp_path):
    path = tmp_path / "cpu.json"
    command = [sys.executable, "-c", NO_BITSANDBYTES, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads(path.read_text())["parts"]
    for name in ("roles nf4", "memory tiny-2 nf4"):
        assert parts[name]["skipped"] == "quantization='nf4' needs bitsandbytes, which is not installed here."
    assert parts["memory tiny-2 bf16"]["passed"] is True


def test_a_broken_part_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    parts = [part("broken", RuntimeError("CUDA error: out of luck\nand more")), part("whole"), part("left out", NotRun("why"))]
    monkeypatch.setattr(validate, "make_parts", lambda device: parts)
    assert validate.main(["--device", "cpu", "--output", str(path)]) == 1
    found = json.loads(path.read_text())
    assert found["passed"] is False
    assert found["parts"]["broken"]["error"] == "RuntimeError: CUDA error: out of luck"
    assert any("in run" in line for line in found["parts"]["broken"]["traceback"])
    assert found["parts"]["whole"]["passed"] is True
    assert found["parts"]["left out"]["skipped"] == "why"
    assert "failed" in capsys.readouterr().out


def test_a_missed_tolerance_fails_and_a_skipped_part_does_not(tmp_path, monkeypatch):
    for number, (result, code) in enumerate([(GOOD | {"passed": False}, 1), (NotRun("why"), 0)]):
        monkeypatch.setattr(validate, "make_parts", lambda device, result=result: [part("one", result)])
        assert validate.main(["--device", "cpu", "--output", str(tmp_path / f"{number}.json")]) == code


def test_the_file_is_named_after_device_and_date(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "make_parts", lambda device: [part()])
    assert validate.main(["--device", "cpu"]) == 0
    path, table = sorted((tmp_path / "docs" / "measurements").iterdir())
    assert path.name == f"cpu-{json.loads(path.read_text())['date'][:10]}.json"
    assert table == path.with_suffix(".md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "there.json"], "output='there.json' exists, and a measurement is not written over; name another file."),
        (["--budget", "0"], "budget=0 must be above 0 seconds; choose a larger one."),
        (["--device", "gpu"], "model.device='gpu' is not a device; use auto, cpu, cuda or cuda:N."),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    assert validate.main(["--device", "cpu", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_a_gpu_is_described(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    answer = SimpleNamespace(stdout="570.86.15\n570.86.15\n")
    monkeypatch.setattr(validate.subprocess, "run", lambda command, **options: answer)
    found = validate.describe_machine(torch.device("cuda"))
    assert (found["name"], found["total_memory_bytes"], found["capability"]) == (card.name, 85 * 10**9, "9.0")
    assert found["driver"] == "570.86.15"
    answer.stdout = ""
    assert validate.describe_machine(torch.device("cuda"))["driver"] is None


def test_on_a_gpu_the_allocator_is_the_judge():
    def profile(size, allocated):
        allocator = {"score": {"max_memory_allocated": allocated, "max_memory_reserved": 2 * allocated}}
        return Profile("hydra", {}, False, "cuda", 0, 0, {"score": Peak(size, {})}, allocator=allocator)

    found = compare_phase(profile(96, 0), profile(90, 100), ["score"])
    assert (found["simulated_to_allocated"], found["reserved_bytes"], found["within_goal"]) == (0.96, 200, True)
    assert not compare_phase(profile(94, 0), profile(94, 100), ["score"])["within_goal"]


# -- the budget ----------------------------------------------------------------------------------------------------------


def test_time_is_shared_by_weight_and_what_is_not_used_goes_on():
    clock, shares = Clock(), []
    options = {"clock": clock, "shares": shares}
    parts = [part("a", weight=1, takes=10, **options), part("b", weight=2, takes=60, **options), part("c", weight=1, **options)]
    run_parts(parts, Budget(100, clock), lambda found: None)
    assert shares == [25, 60, 30]  # 100 x 1/4; 90 x 2/3; 30 x 1/1


def test_a_part_that_does_not_fit_is_skipped_with_the_reason():
    clock = Clock()
    parts = [part("slow", takes=95, clock=clock), part("long", least=20, result=RuntimeError("was begun")), part("short")]
    found = run_parts(parts, Budget(100, clock), lambda found: None)
    assert [verdict(result) for result in found.values()] == ["passed", "skipped", "passed"]
    assert found["long"]["skipped"] == "budget=100 s leaves 2 s for this, and it needs 20."  # 5 s, shared by two parts
    assert found["slow"]["seconds"] == 95


def test_an_overdrawn_budget_leaves_nothing():
    clock = Clock()
    budget = Budget(100, clock)
    clock.now = 130
    assert budget.share(part(), []) == 0


def test_what_was_found_is_kept_after_each_part():
    kept = []
    run_parts([part("a"), part("b")], Budget(100), lambda found: kept.append(list(found)))
    assert kept == [["a"], ["a", "b"]]


def test_a_device_that_cannot_be_cleaned_up_fails_the_part_and_not_the_command():
    def clean():
        raise RuntimeError("an illegal memory access was encountered")

    found = run_parts([part()], Budget(100), lambda found: None, clean)
    assert found["part"]["error"] == "RuntimeError: an illegal memory access was encountered"


def test_responses_are_as_long_as_the_seconds_allow():
    workload = Workload("tiny")
    assert shortened(workload, 1000, 0.1).response == 512
    assert shortened(workload, 50, 0.1).response == 200  # 0.4 x 50 s at 0.1 s a token
    with pytest.raises(
        NotRun, match=r"response=20 is all that can be decoded in 2 s at 0\.100 s a token, and below the least of 32"
    ):
        shortened(workload, 5, 0.1)


def test_a_budget_must_be_positive():
    with pytest.raises(ConfigError, match="budget=-1"):
        Budget(-1)


def test_an_unquantised_base_needs_no_bitsandbytes(monkeypatch):
    monkeypatch.setattr("hydra_ppo.profiling.validate.parts.find_spec", lambda name: None)
    require(None)
    with pytest.raises(NotRun, match="needs bitsandbytes"):
        require("nf4")


# -- what the tolerances catch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_recompute_in_the_wrong_role_is_missed_by_far(quantization, monkeypatch):
    config = LlamaConfig(**validate.TINY, num_hidden_layers=2)
    assert check_roles(config, quantization, CPU, 16)["passed"]
    right = HydraModel._recompute_contexts

    @contextmanager
    def as_actor(model, again):
        with again, model.adapters.using("actor"):
            yield

    monkeypatch.setattr(HydraModel, "_recompute_contexts", lambda self: (nullcontext(), as_actor(self, right(self)[1])))
    found = check_roles(config, quantization, CPU, 16)
    assert not found["passed"]
    assert found["checkpointing_off"]["critic_gradient"] < BF16_TOLERANCES["critic_gradient"]
    assert found["checkpointing_on"]["critic_gradient"] > 10 * BF16_TOLERANCES["critic_gradient"]
