"""Killed without warning, at any point, a run ends with the same bits as one that was left alone."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.faults.child import context, run
from tests.faults.project import assert_same, make_project, ppo_settings, sft_settings, write

MOST = {"rollout": 30, "score": 18, "update": 24, "sft-update": 12, "write": 80}
"""Micro-steps, or touches of files, among which the point is drawn: about half of a run."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    """Runs that were left alone, each in a process like those that are killed."""
    found = {}

    def get(command, name, settings):
        if name not in found:
            settings["run"]["output"] = str(project / f"whole-{name}")
            assert go([command, write(project / "whole.yaml", settings)], project / "whole.log") == 0
            found[name] = project / f"whole-{name}"
        return found[name]

    return get


def go(arguments, log, point=None, after=None):
    """Run a command in a process; kill it `after` so many seconds. Returns its exit code, negative where it was killed."""
    process = context().Process(target=run, args=(arguments, str(log), point))
    process.start()
    if after is not None:
        process.join(after)
        process.kill()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def kill_and_go_on(command, settings, points, reference, folder, rng):
    """Kill runs until every point was hit, going on in between; compare each that comes to its end. Return kills by place."""
    kills = dict.fromkeys(points, 0)
    finished = 0
    while any(kills[place] < count for place, count in points.items()) or finished == 0:
        place = rng.choice([place for place, count in points.items() if kills[place] < count] or [None])
        settings["run"]["output"] = str(folder / f"run{finished}")
        arguments = [command, write(folder / "run.yaml", settings), "--resume"]
        if place is None:
            code = go(arguments, folder / "log")
        elif place == "any time":
            code = go(arguments, folder / "log", after=rng.uniform(0.2, 2.5))
        else:
            code = go(arguments, folder / "log", point=(place, rng.randint(1, MOST[place])))
        if code == -signal.SIGKILL:
            kills[place] += 1
        else:
            assert code == 0, (folder / "log").read_text()[-2000:]
            assert_same(folder / f"run{finished}", reference)
            finished += 1
    return kills


def report(fault, kills, what, seconds):
    total = sum(kills.values())
    places = ", ".join(f"{count} {place}" for place, count in kills.items())
    fault(f"SIGKILL x {total} ({places}) in {what}", f"gone on with --resume, {seconds:.0f} s", "same bits, metrics, samples")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [pytest.param(2, id="some"), pytest.param(8, id="many", marks=pytest.mark.long)])
def test_ppo_killed(count, project, whole, tmp_path, fault):
    begun = time.monotonic()
    reference = whole("ppo", "ppo", ppo_settings(project))
    points = dict.fromkeys(("rollout", "score", "update", "write"), count) | {"any time": count // 2}
    kills = kill_and_go_on("ppo", ppo_settings(project), points, reference, tmp_path, random.Random(count))
    report(fault, kills, "ppo", time.monotonic() - begun)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ppo_on_a_quantised_trunk_killed(project, whole, tmp_path, fault):
    begun = time.monotonic()
    changes = {"model": {"quantization": "nf4", "trunk_layers": 1}}
    reference = whole("ppo", "nf4", ppo_settings(project, **changes))
    points = dict.fromkeys(("rollout", "score", "update", "write"), 2)
    kills = kill_and_go_on("ppo", ppo_settings(project, **changes), points, reference, tmp_path, random.Random(5))
    report(fault, kills, "ppo on nf4 with a trunk", time.monotonic() - begun)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sft_killed(project, whole, tmp_path, fault):
    begun = time.monotonic()
    reference = whole("sft", "sft", sft_settings(project))
    points = {"sft-update": 4, "write": 4}
    kills = kill_and_go_on("sft", sft_settings(project), points, reference, tmp_path, random.Random(6))
    report(fault, kills, "sft", time.monotonic() - begun)
