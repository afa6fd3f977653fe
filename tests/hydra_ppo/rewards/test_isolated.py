"""A reward function has a process of its own: it can be ended, it ends nothing else, and draws the same numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy
import pytest
import torch

from hydra_ppo.config.settings import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, RewardError
from hydra_ppo.rewards import isolated
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import Scorer, check_columns
from hydra_ppo.runtime.interruption import StopRequested, stopping_on_signals

HERE = "tests.hydra_ppo.rewards.hostile"
CPU = torch.device("cpu")
GIVEN = Responses.of_text(["2 + 2?", "3 * 3?"], ["4", "10"])


def settings(name: str, isolation: str = "process", **changes) -> RewardSettings:
    source = RewardSource("function", f"{HERE}:{name}")
    return RewardSettings(sources=[source], isolation=isolation, **changes)


def score(name: str, isolation: str = "process", given: Responses = GIVEN, **changes) -> list[float]:
    return Scorer(settings(name, isolation, **changes), CPU).score([], given, "step=1 phase=score").total


@pytest.fixture(autouse=True, scope="module")
def ended():
    yield
    isolated.end_workers()


def test_the_process_is_kept_and_its_state_with_it():
    assert [score("counts")[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    first = score("tells_its_process")
    assert first == score("tells_its_process")
    assert first[0] != os.getpid()


HANGS = ("sleeps", "regular_expression", "long_sum", "long_power", "ignores_signals")


@pytest.mark.parametrize("name", HANGS)
def test_whatever_it_does_it_ends_with_the_limit(name):
    begun = time.monotonic()
    with pytest.raises(RewardError, match=rf"function .*:{name} took over reward.time_limit=0.3 s; mend the function or raise"):
        score(name, time_limit=0.3)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exits", r"called sys.exit\(\) \(hostile.py, line \d+, in exits\); mend"),
        ("exits_with_3", "ended its process with exit code 3; mend"),
        ("crashes", "lost its process to SIGSEGV; mend"),
        ("runs_out_of_memory", "lost its process to SIGKILL, as where memory runs out; mend"),
        ("interrupts", "raised KeyboardInterrupt: "),
        ("stops", r"raised Stop: in the name of the law \(hostile.py, line \d+, in stops\); mend"),
        ("divides", r"raised ZeroDivisionError: division by zero \(hostile.py, line \d+, in "),
        ("endless", "returned generator; it must return one number per response, in a list"),
        ("reads_input", "raised EOFError"),
    ],
)
def test_what_it_did_is_one_line(name, says):
    with pytest.raises(RewardError, match=f"step=1 phase=score: function {HERE}:{name} {says}") as error:
        score(name)
    assert "\n" not in str(error.value)
    assert score("counts")  # nothing else ended
    if name == "divides":
        assert "1 / (len(text)" in error.value.__cause__.__notes__[0]  # what --traceback shows


@pytest.mark.parametrize(("name", "says"), [("exits", r"called sys.exit\(\)"), ("stops", "raised Stop: in the name")])
def test_in_the_process_of_the_training_too(name, says):
    with pytest.raises(RewardError, match=says):
        score(name, "thread")


POOLS = """
from tests.hydra_ppo.rewards.test_isolated import score, stopping_on_signals
with stopping_on_signals():
    print(score("pools", "thread", time_limit=30.0))
"""


def test_a_pool_that_it_forks_works_and_is_ended():
    """Beside the handlers of signals, which a forked child would have. In the process of the training, that of a run and not of
    these tests: whoever forks a process with threads, which other tests may have left, can wait for a lock for ever."""
    with stopping_on_signals():
        assert score("pools", time_limit=30.0) == [1.0, 2.0]
    done = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, timeout=90)
    assert done.stdout.strip() == "[1.0, 2.0]", done.stderr


def test_what_it_started_ends_with_it():
    with pytest.raises(RewardError, match=r"called sys.exit\(1\)"):
        score("leaves_a_child")
    worker = isolated._workers[f"{HERE}:leaves_a_child"]
    group = worker._process.pid
    worker.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)
    pytest.fail("a child of the reward function lives on")


@pytest.mark.parametrize("name", ["draws", "draws_numpy"])
def test_random_numbers_are_those_of_one_process(name):
    found = {}
    for isolation in ("thread", "process"):
        random.seed(3)
        numpy.random.seed(3)
        torch.manual_seed(3)
        first, second = score(name, isolation), score(name, isolation)
        found[isolation] = (first, random.random(), second, numpy.random.rand(), torch.rand(()).item())
        if isolation == "process":
            isolated.end_workers()  # as where a run goes on in another process
    assert found["thread"] == found["process"]
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    assert score(name) == found["thread"][0]  # of a new process, which imports numpy only when it is called


def test_a_signal_does_not_wait_for_it():
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    with stopping_on_signals(), pytest.raises(StopRequested):
        score("sleeps", time_limit=None)
    assert time.monotonic() - begun < 10
    assert not isolated._workers[f"{HERE}:sleeps"].alive


def test_it_ends_with_the_process_that_started_it():
    code = (
        "import os, signal\n"
        "from tests.hydra_ppo.rewards.test_isolated import score\n"
        "print(int(score('tells_its_process')[0]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process of the reward function lives on")


def test_forms_that_are_served():
    assert score("one_argument") == [1.0, 2.0]
    assert score("asynchronous") == [1.0, 2.0]
    assert [score("Judge")[0], score("Judge")[0]] == [2.0, 3.0]
    assert score("a_lambda") == [3.0, 3.0]
    answers = Responses(GIVEN.prompts, GIVEN.texts, [None] * 2, [{"answer": "4"}] * 2, [True] * 2, GIVEN.texts)
    assert score("keyword_only", given=answers) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        (
            "of_what",
            {},
            r"takes 'completions', which is none of prompts, responses, messages, columns, ended, and the data has no",
        ),
        ("keyword_only", {"id": 1}, "takes 'answer', which is none of .*, and the data has the columns id"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_weight_is_read(name, columns, says):
    with pytest.raises(ConfigError, match=says):
        check_columns(settings(name), [columns])
    check_columns(settings("one_argument"), [columns])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WithArguments", "is a class that cannot be made without arguments"),
        ("Uncallable", "is a class without __call__"),
        ("STATE", "is not callable"),
        ("gone", "cannot be imported"),
    ],
)
def test_what_is_no_function_is_refused_when_it_is_loaded(name, says):
    for isolation in ("process", "thread"):
        with pytest.raises(ConfigError, match=says):
            Scorer(settings(name, isolation), CPU)


def test_a_module_that_ends_the_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, line in (("exiting", "import sys; sys.exit(0)"), ("dying", "import os; os._exit(0)")):
        (tmp_path / f"{name}.py").write_text(line)
        source = RewardSource("function", f"{name}:judge")
        with pytest.raises(ConfigError, match="cannot be imported: it "):
            Scorer(RewardSettings(sources=[source]), CPU)


def test_a_function_of_the_program_itself_needs_the_thread():
    source = RewardSource("function", "__main__:judge")
    with pytest.raises(ConfigError, match=r"put it into a module of its own, or set reward\.isolation=thread"):
        Scorer(RewardSettings(sources=[source]), CPU)


def test_what_cannot_be_handed_over_is_said():
    given = Responses(["p"], ["r"], [None], [{"picture": threading.Lock()}], [True], ["pr"])
    with pytest.raises(ConfigError, match="is to be given what no other process can be given"):
        score("counts", given=given)
