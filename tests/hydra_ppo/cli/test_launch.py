"""`hydra-ppo launch` without a cluster: flags, what ranks are told, a rank as a process. `make test-ray` has the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_ppo.cli import launch
from hydra_ppo.cli.launch import Heard, Ranks, inherited, split
from hydra_ppo.cli.main import BAD_INPUT, FAILED, main
from hydra_ppo.cli.rank_process import RankProcess, free_port, shown
from hydra_ppo.cli.ray_cluster import Taken, by_node, check_reachable, check_versions, variables_of, why_it_died
from hydra_ppo.errors import ConfigError, HydraError

REFUSED = {
    "--ray auto --gpus 2": "launch was given no command; write it behind --",
    "--ray auto --gpus 2 --": "launch was given no command",
    "--ray auto --gpus 2 -- export run": "launch -- export, which runs in one process; launch sft or ppo",
    "--ray auto -- ppo ppo.yaml": "--ray auto needs --gpus N, or --cpus N",
    "--ray auto --gpus 2 --cpus 2 -- ppo": "--ray auto needs --gpus N, or --cpus N on machines without GPUs, and not both",
    "--ray auto --nproc 2 -- ppo": "--ray auto and --nproc 2 name two places to run",
    "--gpus 16 -- ppo": "--gpus 16 is of a Ray cluster, and --ray is not given",
    "-- ppo": "launch was not told where; use --nproc N",
    "--ray auto --gpus 0 -- ppo": "'0' is not a whole number of 1 or more",
    "--ray auto --gpu 2 -- ppo": "--gpu is not an option; did you mean --gpus?",
    "--ray auto --gpus 2 --env NOT_SET_HERE -- ppo": "--env NOT_SET_HERE is not set here",
}


@pytest.mark.parametrize("line", REFUSED)
def test_flags_that_do_not_go_together(line, capsys):
    assert main(["launch", *line.split()]) == BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert REFUSED[line] in error
    assert "\n" not in error


def test_what_stands_behind_the_dashes_is_not_looked_at():
    assert split(["--ray", "auto", "--", "ppo", "--run.output", "x", "--", "y"]) == (
        ["--ray", "auto"],
        ["ppo", "--run.output", "x", "--", "y"],
    )


def test_without_ray_there_is_one_line():
    code = "import sys; sys.modules['ray'] = None\nfrom hydra_ppo.cli.main import main\n"
    code += "sys.exit(main('launch --ray auto --gpus 2 -- ppo ppo.yaml'.split()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == FAILED
    (line,) = done.stderr.splitlines()
    assert line.startswith("--ray needs the package ray, which is not installed")
    assert line.endswith("pip install ray.")


def test_nproc_becomes_torchrun(monkeypatch):
    """Whose exit code, signals and lines are its own."""
    seen = []
    monkeypatch.setattr(os, "execv", lambda *arguments: seen.append(arguments))
    launch.launch(["--nproc", "3", "--", "sft", "sft.yaml", "--run.seed", "1"])
    expected = "-m torch.distributed.run --standalone --nproc-per-node 3 -m hydra_ppo sft sft.yaml --run.seed 1"
    assert seen == [(sys.executable, [sys.executable, *expected.split()])]


def test_variables_that_ranks_inherit():
    there = {"HF_HOME": "a", "NCCL_DEBUG": "b", "PATH": "c", "SECRET": "d", "WANDB_API_KEY": "e", "RANK": "0"}
    assert inherited(there, []) == {"HF_HOME": "a", "NCCL_DEBUG": "b", "WANDB_API_KEY": "e"}
    assert inherited(there, ["SECRET"])["SECRET"] == "d"


# -- places ----------------------------------------------------------------------------------------------------------------


def place(node: str, *gpus: str, port: int = 1):
    return {"node": node, "address": f"10.0.0.{node}", "name": f"host{node}", "gpus": list(gpus), "port": port}


def test_ranks_of_a_node_follow_each_other_and_see_the_gpus_of_their_node():
    """Two nodes, whose actors Ray made in any order; each actor was given one GPU."""
    taken = [Taken(None, place("2", "7", port=99)), Taken(None, place("1", "0")), Taken(None, place("2", "3"))]
    ordered = by_node(taken)
    assert [(seat.place["node"], seat.place["gpus"]) for seat in ordered] == [("2", ["7"]), ("2", ["3"]), ("1", ["0"])]
    found = variables_of([seat.place for seat in ordered])
    assert [(v["RANK"], v["LOCAL_RANK"], v["LOCAL_WORLD_SIZE"], v["CUDA_VISIBLE_DEVICES"]) for v in found] == [
        ("0", "0", "2", "7,3"),
        ("1", "1", "2", "7,3"),
        ("2", "0", "1", "0"),
    ]
    assert {(v["WORLD_SIZE"], v["MASTER_ADDR"], v["MASTER_PORT"]) for v in found} == {("3", "10.0.0.2", "99")}


def test_without_gpus_nothing_is_said_of_them():
    assert "CUDA_VISIBLE_DEVICES" not in variables_of([place("1"), place("1")])[1]


def test_nodes_with_other_versions_are_refused():
    places = [
        place(node) | {"versions": {"hydra-ppo": "0.1.0", "torch": found}} for node, found in (("1", "2.13.0"), ("2", "2.11.0"))
    ]
    check_versions(places[:1] * 2)
    with pytest.raises(ConfigError, match=r"torch==2.11.0 is on host2 \(10.0.0.2\) and torch==2.13.0 on host1 \(10.0.0.1\)"):
        check_versions(places)


def ranks(ended=None, lost=None, blamed=(), late=(), signals=0, count=3) -> Ranks:
    found = Ranks(None, [Taken(None, place(str(number))) for number in range(count)], Heard(), 2)
    found.ended, found.lost, found.blamed, found.late = ended or {}, lost or {}, list(blamed), set(late)
    found.signals = signals
    return found


@pytest.mark.parametrize(
    ("state", "code", "line"),
    [
        ({"ended": {0: (0, 1.0), 1: (0, 2.0)}}, 0, None),
        ({"ended": {0: (1, 2.0), 1: (2, 1.0)}}, 2, "rank 1 on host1 (10.0.0.1) exited with code 2; 1 more failed after it."),
        (
            {"ended": {0: (1, 1.0), 1: (-9, 2.0)}},
            137,
            "rank 1 on host1 (10.0.0.1) was killed by SIGKILL; 1 more failed after it.",
        ),
        (
            {"ended": {0: (-9, 1.0), 1: (3, 2.0)}, "blamed": [1], "late": {0}},
            3,
            "rank 1 on host1 (10.0.0.1) exited with code 3;",
        ),
        ({"ended": {0: (0, 1.0), 1: (-9, 2.0)}, "late": {1}}, 137, "had not stopped 2 seconds after SIGTERM and was killed."),
        ({"ended": {0: (0, 1.0), 1: (-15, 2.0)}, "signals": 1}, 0, None),
        ({"ended": {0: (0, 1.0), 1: (-15, 2.0)}}, 143, "rank 1 on host1 (10.0.0.1) was killed by SIGTERM."),
        ({"ended": {0: (130, 1.0)}}, 130, "rank 0 on host0 (10.0.0.0) exited with code 130."),
    ],
    ids=["fine", "earlier", "killed", "late-is-not-first", "late", "asked", "not-asked", "interrupted"],
)
def test_who_failed_first(state, code, line, capsys):
    assert ranks(**state)._verdict() == code
    error = capsys.readouterr().err
    assert (line or "") in error
    assert len(error.splitlines()) == (line is not None)


def test_an_actor_that_is_lost_is_named_before_those_that_failed_of_it():
    with pytest.raises(HydraError, match=r"rank 2 on host2 \(10.0.0.2\) is lost, its node or its actor died: gone"):
        ranks({0: (1, 1.0)}, {2: "gone"})._verdict()


def test_the_line_of_a_lost_actor_is_short():
    ray = "The actor died unexpectedly before finishing this task.\n\tclass_name: Seat\n\tactor_id: 8f\n\tpid: 3"
    assert why_it_died(RuntimeError(ray)) == "The actor died unexpectedly before finishing this task."
    assert why_it_died(RuntimeError()) == "RuntimeError"


# -- a rank ----------------------------------------------------------------------------------------------------------------


def rank(code: str, folder: Path, **variables: str | None) -> RankProcess:
    return RankProcess([sys.executable, "-u", "-c", code], variables, str(folder))


def finish(process: RankProcess, within: float = 30.0) -> tuple[list[tuple[int, str]], int]:
    lines: list[tuple[int, str]] = []
    until = time.monotonic() + within
    while time.monotonic() < until:
        report = process.report(0.2)
        lines += report.lines
        if report.code is not None:
            return lines, report.code
    raise AssertionError(f"still runs, after {lines}")


def test_lines_come_through_and_the_code_after_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TAKEN_AWAY", "1")
    code = "import os, sys; print(os.getcwd()); print(os.environ.get('TAKEN_AWAY'), os.environ['RANK']); "
    code += "print('fail', file=sys.stderr); print('no end', end=''); sys.exit(3)"
    lines, ended = finish(rank(code, tmp_path, RANK="1", TAKEN_AWAY=None))
    assert ended == 3
    assert [line for stream, line in lines if stream == 1] == [str(tmp_path), "None 1", "no end"]
    assert [line for stream, line in lines if stream == 2] == ["fail"]


def test_many_lines_and_long_ones(tmp_path):
    code = "for i in range(30000): print(i)\nprint('x' * 200000)"
    lines, ended = finish(rank(code, tmp_path))
    assert ended == 0
    assert [line for _, line in lines[:30000]] == [str(i) for i in range(30000)]
    assert "".join(line for _, line in lines[30000:]) == "x" * 200000


def test_a_progress_bar_is_the_line_that_a_terminal_shows_at_last():
    assert shown(b"10%\r50%\r100%") == "100%"
    assert shown(b"done\r") == "done"
    assert shown("größer \xff".encode("latin-1")) == "gr\\xf6\\xdfer \\xff"


def test_signals(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready'); time.sleep(60)"
    process = rank(code, tmp_path)
    while not process.report(0.2).lines:
        pass
    process.send(signal.SIGTERM)
    assert finish(process) == ([], 7)
    process.send(signal.SIGTERM)  # to one that has ended


def test_a_kill_reaches_what_the_rank_has_started(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += "print(p.pid); time.sleep(60)"
    process = rank(code, tmp_path)
    lines: list[tuple[int, str]] = []
    while not lines:
        lines = process.report(0.2).lines
    process.send(signal.SIGKILL)
    assert finish(process)[1] == -signal.SIGKILL
    child = int(lines[0][1])
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_process_that_is_left_behind_keeps_nobody_waiting(tmp_path):
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(8)']); print('left')"
    begun = time.monotonic()
    process = rank(code, tmp_path)
    assert finish(process) == ([(1, "left")], 0)
    assert time.monotonic() - begun < 7.5  # it holds the pipe for eight
    process.send(signal.SIGKILL)


def test_a_rank_is_told_when_whoever_started_it_is_gone(tmp_path):
    code = f"""
import sys, time
from hydra_ppo.cli.rank_process import RankProcess
inner = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open('told', 'w'), sys.exit())); "
inner += "open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
RankProcess([sys.executable, "-c", inner], {{}}, {str(tmp_path)!r})
time.sleep(60)
"""
    outer = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    outer.kill()
    outer.wait()
    while not (tmp_path / "told").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError):
        rank("", tmp_path / "none")


def test_a_port_that_is_free():
    assert 1024 <= free_port() < 2**16


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_an_address_where_nobody_listens_is_known_at_once(address):
    """Ray itself goes on trying for minutes."""
    with pytest.raises(ConfigError, match=f"--ray {address}: there is no Ray cluster to be reached"):
        check_reachable(address)
