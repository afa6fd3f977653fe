"""The conversation with workers, and our own workers. Nothing is installed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks.peers import run
from hydra_ppo.profiling.benchmarks.peers.floor import multiply_adds
from hydra_ppo.profiling.benchmarks.peers.load import REPEATS
from hydra_ppo.profiling.benchmarks.peers.processes import Worker, WorkerError
from hydra_ppo.profiling.benchmarks.peers.workloads import LORA_ALPHA, LORA_RANK, WORKLOADS

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
