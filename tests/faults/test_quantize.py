"""`hydra-ppo quantize` killed at any change of a file, or on a disk that is full: no half a folder under the name asked for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from hydra_ppo.cli.main import main
from hydra_ppo.compat import loads_quantised
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.loading import load_base, quantization_of
from tests.faults.child import EVENTS, context
from tests.faults.child import run as run_child
from tests.faults.project import make_project
from tests.hydra_ppo.model.test_whole import BASE

pytestmark = pytest.mark.skipif(not loads_quantised(torch.device("cpu")), reason="transformers reads it on a GPU alone")
ASIDE = ".writing-out"


def child(project: Path, point=None, limit=None) -> tuple[int | None, str]:
    """Quantise in a process of its own; return its exit code and what it printed."""
    log = project / "log"
    log.unlink(missing_ok=True)
    arguments = ["quantize", str(project / "base"), "--output", str(project / "out")]
    process = context().Process(target=run_child, args=(arguments, str(log), point, limit))
    process.start()
    process.join(120)
    return process.exitcode, log.read_text()


def test_killed_at_any_change_of_a_file(tmp_path, fault):
    project = make_project(tmp_path)
    code, log = child(project, point=(f"/{ASIDE}/", 10**6))
    assert code == 0
    events = int(log.split(EVENTS)[1].split()[0])
    assert events > 5
    whole = {path.name: path.read_bytes() for path in (project / "out").iterdir()}
    again = 0
    for number in range(1, events + 1, 3):
        for path in (project / "out").glob("*"):
            path.unlink()
        (project / "out").rmdir()
        assert child(project, point=(f"/{ASIDE}/", number))[0] == -signal.SIGKILL
        if not (project / "out").exists():  # else it died after the move, and the folder is whole
            with pytest.raises(ConfigError, match="no folder of that name"):
                load_base(str(project / "out"), **BASE)
            assert child(project)[0] == 0
            again += 1
        assert {path.name: path.read_bytes() for path in (project / "out").iterdir()} == whole
        assert not (project / ASIDE).exists()
    assert again > 1
    fault("killed while a base is quantised", "nothing under its name", "the same files the next time")


@pytest.mark.parametrize("size", [700, 30_000], ids=["for a config", "for the weights"])
def test_on_a_disk_that_is_full(size, tmp_path, fault):
    """A true failed write: the process may not write a file of more bytes."""
    project = make_project(tmp_path)
    code, log = child(project, limit={"file_bytes": size})
    line = log.strip().splitlines()[-1]
    assert code == 2, log
    assert line.startswith(f"output='{project / 'out'}' cannot be written ("), line
    assert line.endswith("; make room, or choose another folder.")
    assert sorted(path.name for path in project.iterdir()) == ["base", "log", "pairs.jsonl"]
    fault("a disk that is full while a base is quantised", f"exit code 2: {line[:60]}", "nothing is left")


def test_the_same_command_again_writes_nothing(tmp_path, capsys):
    project = make_project(tmp_path)
    assert child(project)[0] == 0
    assert main(["quantize", str(project / "base"), "--output", str(project / "out")]) == 2
    assert "is not empty; choose another folder." in capsys.readouterr().err
    assert quantization_of(load_base(str(project / "out"), **BASE)) == "nf4"
