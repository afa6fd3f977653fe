"""Environments are built once, and only where a contestant needs one. Nothing is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.benchmarks.peers import environments


def test_own_environment_needs_nothing(tmp_path: Path):
    found = environments.prepare(tmp_path / "peers", ["hydra"], pytest.fail)
    assert found["hydra"].python == sys.executable
    assert not (tmp_path / "peers").exists()
    with pytest.raises(ConfigError, match="environment='trl999' is not known"):
        environments.prepare(tmp_path, ["trl999"], pytest.fail)


def test_an_environment_is_built_once(tmp_path: Path, monkeypatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", commands.append)
    lines: list[str] = []
    first = environments.prepare(tmp_path, ["trl112", "trl011"], lines.append)
    _, _, torch_alone, the_rest = commands  # the first installs trl112, the second makes the environment of trl011
    assert torch_alone[-2:] == ["--disable-pip-version-check", environments.TORCH]
    assert environments.TORCH in the_rest
    assert lines
    commands.clear()
    assert environments.prepare(tmp_path, ["trl112", "trl011"], pytest.fail) == first
    assert commands == []
    assert first["trl112"].variables["PYTHONPATH"].startswith(str(tmp_path))


def test_an_interrupted_installation_is_done_again(tmp_path: Path, monkeypatch):
    def fail(command):
        raise environments.InstallError("no index")

    monkeypatch.setattr(environments, "_run", fail)
    with pytest.raises(environments.InstallError):
        environments.prepare(tmp_path, ["trl112"], lambda line: None)
    done: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", done.append)
    environments.prepare(tmp_path, ["trl112"], lambda line: None)
    assert len(done) == 1
