"""A run is killed before every change of a file; whatever is left goes on, or begins anew, and ends with the same bits."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.child import EVENTS
from tests.faults.project import assert_same, make_project, ppo_settings, sft_settings, write
from tests.faults.test_killed import go

BEYOND = 10**6
SHORT = {"run": {"save_every": 1, "keep_last": 1, "keep_best": 1}}
SETTINGS = {
    "ppo": lambda folder, output: ppo_settings(folder, output, steps=2, eval_every=1, rollout={"batch_size": 4}, **SHORT),
    "sft": lambda folder, output: sft_settings(folder, output, epochs=1, batch_size=10, eval_every=1, **SHORT),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def settings_of(command: str, project: Path, output: Path, overwrite: bool) -> dict:
    settings = SETTINGS[command](project, "run")
    settings["run"] |= {"output": str(output), "overwrite": overwrite}
    return settings


def kill_at_each(command, project, folder, overwrite):
    """Kill a run at every change; return how many there were, and how many kills.

    Args:
        overwrite: the run replaces a finished one of another seed, which must never be gone on with instead.
    """
    reference, log = folder / "whole", folder / "log"
    arguments = [command, write(folder / "whole.yaml", settings_of(command, project, reference, overwrite=False))]
    assert go(arguments, log, point=(f"{reference}/", BEYOND)) == 0, log.read_text()
    before = folder / "before"
    if overwrite:
        other = settings_of(command, project, before, overwrite=False)
        other["run"]["seed"] = 5
        assert go([command, write(folder / "other.yaml", other)], log) == 0
    run = folder / "run"
    if before.exists():
        shutil.copytree(before, run)
    arguments = [command, write(folder / "run.yaml", settings_of(command, project, run, overwrite))]
    log.write_text("")
    assert go(arguments, log, point=(f"{run}/", BEYOND)) == 0
    changes = int(re.search(f"{EVENTS}([0-9]+)", log.read_text())[1])
    kills = 0
    for number in range(1, changes + 1):
        shutil.rmtree(run)
        if before.exists():
            shutil.copytree(before, run)
        log.write_text("")
        code = go(arguments, log, point=(f"{run}/", number))
        assert code == -9, (number, code, log.read_text()[-500:])
        kills += 1
        again = settings_of(command, project, run, overwrite=False)
        state = json.loads((run / "state.json").read_text()) if (run / "state.json").exists() else None
        if overwrite and (state is None or state["state"] == "finished"):
            continue  # not a thing of it had been touched: the run of the other seed stands, whole
        assert go([command, write(folder / "again.yaml", again), "--resume"], log) == 0, (number, log.read_text()[-2000:])
        assert_same(run, reference)
        assert json.loads((run / "state.json").read_text())["state"] == "finished"
        left = [path for path in run.rglob("*") if path.name.startswith((".writing", ".dropping")) or path.suffix == ".partial"]
        assert left == [], number
    return changes, kills


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("command", "overwrite"), [(command, overwrite) for command in ("ppo", "sft") for overwrite in (False, True)]
)
def test_killed_at_every_change_of_a_file(command, overwrite, project, tmp_path, fault):
    begun = time.monotonic()
    changes, kills = kill_at_each(command, project, tmp_path, overwrite)
    over = " over a finished one" if overwrite else ""
    fault(
        f"SIGKILL at {kills} of {changes} changes of files of a whole {command} run{over}",
        f"gone on with --resume, or begun anew, {time.monotonic() - begun:.0f} s",
        "same bits, metrics, samples",
    )
