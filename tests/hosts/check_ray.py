"""`hydra-ppo launch --ray` on a Ray of this machine, two CPU slots: `make test-ray`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import house
from tests.faults.project import assert_same, make_project, ppo_settings, write

SCRIPT = str(Path(__file__).with_name("ranks.py"))

LAUNCHER = """
import os, sys
from hydra_ppo.cli import launch
from hydra_ppo.cli.main import main
command = sys.argv[1:]
if command[0] == "--script":  # any script in place of `-m hydra_ppo ppo`
    launch.check = lambda *_: None
    on_ray = launch.on_ray
    launch.on_ray = lambda address, slots, ours, *rest: on_ray(address, slots, ours[2:], *rest)
    command = command[1:]
sys.exit(main(["launch", *command]))
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(house.ROOT), "PYTHONUNBUFFERED": "1"} | more


def started(folder: Path, *arguments: object, **options: object) -> subprocess.Popen:
    line = [sys.executable, "-W", "ignore", "-c", LAUNCHER, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=folder, env=environment(), **pipes | options)


def launched(folder: Path, *arguments: object) -> tuple[int, str, str]:
    process = started(folder, *arguments)
    out, err = process.communicate(timeout=240)
    print(f"$ launch {' '.join(map(str, arguments))}\n{out}{err}-> {process.returncode}")
    return process.returncode, out, err


ON_RAY = ("--script", "--ray", "local", "--cpus", 2)


def torchrun(folder: Path, *arguments: object) -> int:
    """Run what launch runs, by torchrun."""
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*start, *map(str, arguments)], cwd=folder, env=environment(), timeout=240).returncode


def test_the_result_is_that_of_torchrun_bit_for_bit(tmp_path):
    for name in ("ray", "torchrun"):
        (tmp_path / name).mkdir()
    code, out, err = launched(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path / "ray")
    assert code == 0
    lines = out.splitlines()
    assert "I am RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2" in lines
    assert "[rank 1] I am RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2" in lines
    assert sorted(line for line in err.splitlines() if "%" in line) == ["100%", "[rank 1] 100%"]  # all else was overwritten
    assert torchrun(tmp_path, SCRIPT, tmp_path / "torchrun") == 0
    for rank in range(2):
        ours, theirs = (torch.load(tmp_path / name / f"{rank}.pt") for name in ("ray", "torchrun"))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_exit_code_is_that_of_the_rank_that_failed_first(tmp_path, rank):
    code, _, err = launched(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path, "fail", rank, 7)
    assert code == 7
    (line,) = [line for line in err.splitlines() if "exited with code 7" in line]
    assert line.startswith(f"rank {rank} on ")
    assert ("[rank 1] bad input" if rank else "bad input") in err.splitlines()
    assert_gone(tmp_path)


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path):
    code, _, err = launched(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path, "kill", 1)
    assert code == 128 + signal.SIGKILL
    assert [line for line in err.splitlines() if line.startswith("rank 1 on ") and "was killed by SIGKILL" in line]
    assert_gone(tmp_path)


def test_a_rank_that_failed_is_named_though_another_had_to_be_killed(tmp_path):
    """The other waits for it without hearing that it is gone, as in a collective of NCCL."""
    code, _, err = launched(tmp_path, *ON_RAY, "--grace", 2, "--", SCRIPT, tmp_path, "leave", 1, 5)
    assert code == 5
    assert "exited with code 5; 1 more failed after it" in err.splitlines()[-1]
    assert_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_as_sigterm(tmp_path, number):
    process = started(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path, "wait")
    until(process, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    print(out + err)
    assert process.returncode == 0
    assert sorted(out.split("\n")[:-1])[-2:] == ["[rank 1] stopped as asked", "stopped as asked"]
    assert all((tmp_path / f"{rank}.stopped").exists() for rank in range(2))
    assert_gone(tmp_path)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(tmp_path):
    process = started(tmp_path, *ON_RAY, "--grace", 2, "--", SCRIPT, tmp_path, "deaf")
    until(process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    print(err)
    assert process.returncode == 128 + signal.SIGKILL
    assert "had not stopped 2 seconds after SIGTERM and was killed; 1 more failed after it" in err.splitlines()[-1]
    assert_gone(tmp_path)


def test_a_launcher_that_is_killed_leaves_no_rank_behind(tmp_path):
    process = started(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path, "wait")
    until(process, 2)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(tmp_path, within=60)


def test_an_actor_that_dies_is_named(tmp_path):
    process = started(tmp_path, *ON_RAY, "--", SCRIPT, tmp_path, "wait")
    until(process, 2)
    child = int((tmp_path / "1.pid").read_text())
    stat = Path(f"/proc/{child}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)  # its parent, the actor
    _, err = process.communicate(timeout=120)
    print(err)
    assert process.returncode == 1
    assert [line for line in err.splitlines() if line.startswith("rank 1 on ") and "is lost" in line]
    assert_gone(tmp_path)


# -- a cluster of two nodes, both on this machine -----------------------------------------------------------------------------


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    found = Cluster(initialize_head=True, head_node_args=small)
    found.other = found.add_node(num_cpus=1, object_store_memory=100_000_000)
    yield found
    found.shutdown()


def test_ranks_on_two_nodes_and_a_node_that_dies(tmp_path, cluster):
    process = started(tmp_path, "--script", "--ray", cluster.address, "--cpus", 2, "--", SCRIPT, tmp_path, "wait")
    lines = until(process, 2)
    print(*lines, sep="")
    assert sorted(line.removeprefix("[rank 1] ") for line in lines if "I am" in line) == [
        f"I am RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1\n" for rank in range(2)
    ]
    cluster.remove_node(cluster.other, allow_graceful=False)
    _, err = process.communicate(timeout=120)
    print(err)
    assert process.returncode == 1
    assert "is lost, its node or its actor died" in err.splitlines()[-1]
    assert_gone(tmp_path)


def test_a_cluster_in_use_is_waited_for_and_not_for_ever(tmp_path, cluster):
    process = started(tmp_path, "--script", "--ray", cluster.address, "--cpus", 2, "--", SCRIPT, tmp_path, "wait")
    until(process, 2)
    code, _, err = launched(tmp_path, "--script", "--ray", cluster.address, "--cpus", 1, "--wait", 3, "--", SCRIPT, tmp_path)
    assert code == 2
    assert "--cpus 1: after 3 seconds the Ray cluster has 2, of which 0 are free" in err.splitlines()[-1]
    code, _, err = launched(tmp_path, "--script", "--ray", cluster.address, "--cpus", 3, "--", SCRIPT, tmp_path)
    assert code == 2
    assert "--cpus 3, but the Ray cluster has 2" in err.splitlines()[-1]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


# -- the real command ------------------------------------------------------------------------------------------------------

PPO_ON_RAY = ("--ray", "local", "--cpus", 2, "--env", "PYTHONPATH", "--", "ppo")
APART = ("parallel",)  # how long each waited


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project) -> Path:
    """A run by torchrun."""
    config = write(project / "torchrun.yaml", ppo_settings(project, "torchrun"))
    assert torchrun(project, "-m", "hydra_ppo", "ppo", config) == 0
    return project / "torchrun"


def test_ppo_gives_the_bits_that_torchrun_gives(project, whole):
    code, out, _ = launched(project, *PPO_ON_RAY, write(project / "ray.yaml", ppo_settings(project, "ray")))
    assert code == 0
    assert any(line.startswith("Saved in") for line in out.splitlines())
    assert "[rank 1]" not in out  # one speaks
    assert_same(project / "ray", whole, APART)


def test_ppo_stopped_by_a_signal_goes_on_to_the_same_bits(project, whole):
    config = write(project / "stopped.yaml", ppo_settings(project, "stopped"))
    process = started(project, *PPO_ON_RAY, config)
    metrics = project / "stopped/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    print(out, err)
    assert process.returncode == 0
    before = len(metrics.read_text().splitlines())
    assert 0 < before < len((whole / "metrics.jsonl").read_text().splitlines())
    assert launched(project, *PPO_ON_RAY, config, "--resume")[0] == 0
    assert_same(project / "stopped", whole, APART)


def test_bad_input_is_one_line_with_its_exit_code(project):
    code, _, err = launched(project, *PPO_ON_RAY, project / "none.yaml")
    assert code == 2
    lines = err.splitlines()
    assert any("none.yaml" in line for line in lines[:-1])
    assert "exited with code 2; 1 more failed after it" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--ray", "local", "--gpus", 2, "--", "ppo"), "--gpus 2, but the Ray cluster has 0"),
        (("--ray", "local", "--gpus", 2, "--wait", 2, "--", "ppo"), "--gpus 2: after 2 seconds the Ray cluster has 0"),
        (("--ray", "auto", "--gpus", 2, "--", "ppo"), "--ray auto: there is no Ray cluster to be reached"),
        (("--ray", "127.0.0.1:1", "--cpus", 2, "--", "ppo"), "--ray 127.0.0.1:1: there is no Ray cluster to be reached"),
    ],
    ids=["gpus", "wait", "auto", "address"],
)
def test_a_cluster_that_lacks_something_is_one_line(tmp_path, arguments, line):
    begun = time.monotonic()
    code, _, err = launched(tmp_path, *arguments)
    assert code == 2
    assert line in err.splitlines()[-1]
    assert time.monotonic() - begun < 120


def until(process: subprocess.Popen, count: int) -> list[str]:
    """Wait until so many ranks have said that they wait; return what was printed."""
    lines: list[str] = []
    while sum(line.endswith("waiting\n") for line in lines) < count:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    return lines


def assert_gone(folder: Path, within: float = 15.0) -> None:
    for path in folder.glob("*.pid"):
        until = time.monotonic() + within
        while alive(int(path.read_text())):
            assert time.monotonic() < until, f"{path.name} still runs"
            time.sleep(0.2)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
