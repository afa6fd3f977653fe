"""What happens around a run: its terminal closes, nobody reads what it prints, its disk for output is full."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.project import assert_same, make_project, ppo_settings, write


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    done = begin(project, "whole", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.wait(120) == 0, done.stderr.read()
    return project / "whole"


def begin(project, output, *flags, shell="", **options):
    reward = {"sources": [{"kind": "function", "target": "tests.faults.light:slow", "name": "judge"}]}
    settings = ppo_settings(project, output, steps=3, eval_every=0, run={"save_every": 1, "progress": True}, reward=reward)
    command = [sys.executable, "-m", "hydra_ppo.cli", "ppo", write(project / f"{output}.yaml", settings), *flags]
    if shell:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("more", {})
    return subprocess.Popen(command, env=env, **options)


def state(project, output):
    return json.loads((project / output / "state.json").read_text())["state"]


OUTPUTS = {
    "| head -1": {"shell": "2>&1 | head -1"},
    "> /dev/full": {"shell": "> /dev/full 2>&1"},
    "an ascii terminal": {"more": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}},
    "closed": {"shell": ">&- 2>&-"},
}


@pytest.mark.long  # tests/hydra_ppo/runtime/test_output.py is the quick half
@pytest.mark.parametrize("name", OUTPUTS)
def test_output_that_cannot_be_written(name, project, whole, fault):
    output = "out" + "".join(c for c in name if c.isalpha())
    done = begin(project, output, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **OUTPUTS[name]})
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert b"Traceback" not in err
    assert state(project, output) == "finished"
    assert_same(project / output, whole)
    fault(f"output {name}", "went on to its end, exit 0", "same bits")


def wait_for_a_checkpoint(folder):
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
def test_a_terminal_that_closes(project, whole, fault):
    """The run's terminal goes: SIGHUP comes, and from then on every write fails."""
    ours, theirs = pty.openpty()
    process = begin(project, "hangup", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    wait_for_a_checkpoint(project / "hangup")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert state(project, "hangup") == "interrupted"
    again = begin(project, "hangup", "--resume", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert again.wait(120) == 0
    assert_same(project / "hangup", whole, without=("eval/",))
    fault("SIGHUP and a terminal that is gone", "a checkpoint, exit 0, went on", "same bits")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_loads(number, project, fault):
    """At any moment from its first line of Python on: a line at most, and never a traceback."""
    for index, after in enumerate((0.3, 0.8, 1.5, 2.2, 3.0)):
        name = f"early-{number.name}-{index}"
        process = begin(project, name, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(after)
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # as `timeout` and a terminal do
        _, err = process.communicate(timeout=60)
        assert b"Traceback" not in err, (after, err)
        assert process.returncode in (0, 130, -number), (after, err)  # the last where Python itself was starting
    fault(f"{number.name} twice at five moments of loading", "a line, no traceback", "-")
