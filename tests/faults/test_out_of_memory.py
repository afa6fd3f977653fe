"""Out of memory in any phase: half as much at once, the same work again, and what a run with that size from the start gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hydra_ppo.cli.main import main
from hydra_ppo.errors import OutOfMemory
from hydra_ppo.runtime.exhaustion import Limits, free_bytes, is_out_of_memory
from tests.faults.project import assert_same, make_project, ppo_settings, quick_first, records, sft_settings, weights, write

CPU = torch.device("cpu")
GPU_TEXT = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB."
CLOSE = 5e-5
"""Weights after steps of which some were summed in micro-batches of another size: fp32 sums in another order, and AdamW."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def run(project, command, name, **changes):
    make = ppo_settings if command == "ppo" else sft_settings
    code = main([command, write(project / f"{name}.yaml", make(project, name, **changes))])
    return code, project / name


SIZES = {
    "rollout": ("rollout.generation_batch_size", {"rollout": {"generation_batch_size": 4}}),
    "update-critic": ("microbatch_size", {"microbatch_size": 2}),
    "score": ("rollout.score_batch_size", {"rollout": {"score_batch_size": 2}}),
    "update-actor": ("microbatch_size", {"microbatch_size": 2}),
    "optimizer": ("microbatch_size", {"microbatch_size": 2}),
}
START = {"rollout": {"generation_batch_size": 8, "score_batch_size": 4}, "microbatch_size": 4, "eval_every": 0, "steps": 3}
EVAL = {"data": {"eval_fraction": 0.0}}


def halved(**changes):
    return {**START, **EVAL, **{k: START[k] | v if isinstance(v, dict) else v for k, v in changes.items()}}


def fail_once(monkeypatch, phase, number=1, error=GPU_TEXT):
    """Raise where a phase begins for the how-manieth time, as an allocator does."""
    from hydra_ppo.training.ppo import PPOTrainer

    announce, seen = PPOTrainer._announce, {"count": 0}

    def announcing(self, name):
        announce(self, name)
        seen["count"] += name == phase
        if name == phase and seen["count"] == number:
            raise torch.OutOfMemoryError(error)

    monkeypatch.setattr(PPOTrainer, "_announce", announcing)


@pytest.mark.parametrize("phase", quick_first(SIZES, 2))
def test_each_phase_of_ppo(phase, project, monkeypatch, fault):
    """In the first optimizer step all that follows has the smaller size, so the bits are the same."""
    setting, smaller = SIZES[phase]
    code, reference = run(project, "ppo", f"small-{phase}", **halved(**smaller))
    assert code == 0
    with monkeypatch.context() as patch:
        fail_once(patch, phase)
        code, after = run(project, "ppo", f"oom-{phase}", **halved())
    assert code == 0
    assert_same(after, reference)
    size = {"rollout": 8}.get(phase, 4)
    line = next(line for line in (after / "log.txt").read_text().splitlines() if "out of memory" in line)
    assert f"out of memory (1,610,612,736 bytes asked, {_free(line)} bytes free) with {setting}={size}" in line
    assert line.endswith(f"the same work is done again with {setting}={size // 2}, which stays.")
    assert "step=1 phase=" in line
    fault(f"out of memory at {phase}", f"{setting} {size} -> {size // 2}, logged with bytes asked and free", "same bits")


def _free(line):
    return re.search(r"asked, ([\d,]+) bytes free", line)[1]


@pytest.mark.long
def test_later_in_a_run(project, monkeypatch):
    """Optimizer steps before the failure were summed in other pieces: equal but for rounding."""
    code, reference = run(project, "ppo", "small-later", **halved(microbatch_size=2))
    with monkeypatch.context() as patch:
        fail_once(patch, "update-critic", number=6)
        code, after = run(project, "ppo", "oom-later", **halved())
    assert code == 0
    one, other = (
        {k: torch.frombuffer(bytearray(v), dtype=torch.float32) for k, v in weights(f).items()} for f in (after, reference)
    )
    assert max((one[name] - other[name]).abs().max().item() for name in one) < CLOSE
    assert records(after)[-1]["rollout/response_length"] == records(reference)[-1]["rollout/response_length"]


@pytest.mark.long
def test_twice_and_the_size_outlives_a_resume(project, monkeypatch):
    with monkeypatch.context() as patch:
        fail_once(patch, "update-actor")
        code, folder = run(project, "ppo", "twice", **halved(steps=1))
    assert code == 0
    state = json.loads((folder / "checkpoints" / "step-000001" / "trainer.json").read_text())
    assert state["limits"]["microbatch_size"] == 2
    settings = ppo_settings(project, "twice", **halved(steps=2))
    with monkeypatch.context() as patch:
        fail_once(patch, "update-actor")
        assert main(["ppo", write(project / "twice.yaml", settings), "--resume"]) == 0
    assert "with microbatch_size=2; the same work is done again with microbatch_size=1" in (folder / "log.txt").read_text()


def test_one_row_does_not_fit(project, monkeypatch, capsys):
    from hydra_ppo.training.ppo_update import Updates

    def never(self, *arguments):
        raise torch.OutOfMemoryError(GPU_TEXT)

    monkeypatch.setattr(Updates, "critic_backward", never)
    code, folder = run(project, "ppo", "never", **halved())
    assert code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("step=1 phase=update: out of memory (1,610,612,736 bytes asked, ")
    assert "with microbatch_size=1, which cannot be halved; use shorter responses" in line
    assert json.loads((folder / "state.json").read_text())["state"] == "failed"


def test_sft(project, monkeypatch, fault):
    from hydra_ppo.training.joint_sft import JointSFTTrainer

    changes = {"microbatch_size": 4, "data": {"eval_fraction": 0.0}}
    code, reference = run(project, "sft", "sft-small", **changes | {"microbatch_size": 2})
    assert code == 0
    passes, seen = JointSFTTrainer.pass_over, []

    def once(self, rows):
        seen.append(len(rows))
        if len(seen) == 2:
            raise torch.OutOfMemoryError(GPU_TEXT)
        return passes(self, rows)

    monkeypatch.setattr(JointSFTTrainer, "pass_over", once)
    code, after = run(project, "sft", "sft-oom", **changes)
    assert code == 0
    assert seen[:4] == [4, 4, 2, 2]
    assert_same(after, reference)
    fault("out of memory in sft, second micro-batch", "microbatch_size 4 -> 2", "same bits")


def test_a_true_lack_of_memory_on_the_host(fault):
    """Not a pretended one: the allocator of the CPU is asked for more than there is."""
    notes = []
    limits = Limits({"rows": 8}, CPU, notes.append)

    def attempt(rows):
        return rows if rows < 4 else torch.empty(2**50, dtype=torch.uint8)

    assert limits.fit("rows", "step=1 phase=update", attempt, most=8) == 2
    assert (limits.sizes["rows"], limits.events) == (2, 2)
    assert f"{2**50:,} bytes asked" in notes[0]
    fault("an allocation of 1 PiB on the host", "halved twice", "the allocator's own error was understood")


def test_other_errors_pass(project):
    limits = Limits({"rows": 8}, CPU)
    with pytest.raises(RuntimeError, match="shape"):
        limits.fit("rows", "", lambda rows: (_ for _ in ()).throw(RuntimeError("shape")), most=8)
    with pytest.raises(OutOfMemory, match="rows=1, which cannot be halved"):
        limits.fit("rows", "", lambda rows: (_ for _ in ()).throw(MemoryError()), most=3)


def test_a_failed_try_is_let_go_of():
    """The tensors of a failed try are free before the next begins."""
    import weakref

    held = []

    def attempt(rows):
        if held:
            assert held[0]() is None
            return rows
        big = torch.ones(10)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError(GPU_TEXT)

    assert Limits({"rows": 8}, CPU).fit("rows", "", attempt, most=8) == 4


def test_free_bytes_of_the_host():
    text = Path("/proc/meminfo").read_text()
    kib = int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
    assert abs(free_bytes(CPU) - kib * 1024) < 2**30
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    assert not is_out_of_memory(ValueError("out of memory"))
