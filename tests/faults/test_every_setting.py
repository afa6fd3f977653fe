"""Every setting of both commands, given what it cannot be: one line with its full name, exit code 2, nothing written."""

from __future__ import annotations

from typing import get_args, get_origin

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.config.reading import describe, item_class, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from tests.faults.project import write

REQUIRED = ["--model.name_or_path", "base", "--data.train", "rows.jsonl", "--run.output", "run"]
COMMANDS = {"ppo": PPOConfig, "sft": SFTConfig}


def wrong_values(hint) -> list[str]:
    """Return what a flag may say that a setting of this type cannot be."""
    kinds = get_args(hint) or (hint,)
    if str in kinds:  # any text will do
        return []
    if get_origin(hint) is dict:
        return ["word", "3"]
    if item_class(hint) is not None:
        return ["word", "[word]", "[{no_such_key: 1}]"]
    if bool in kinds:
        return ["perhaps", "3"]
    return ["word", "[1, 2]", "true"] if int in kinds or float in kinds else ["word", "[word]", "3"]


SHARE = [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)]
"""Every how-manieth setting is tried."""


@pytest.mark.parametrize("every", SHARE)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_refuses_what_it_cannot_be(command, every, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    count = 0
    for name, setting in list(settings_of(COMMANDS[command]).items())[::every]:
        for value in wrong_values(setting.hint):
            assert main([command, *REQUIRED, f"--{name}", value]) == 2, (name, value)
            line = capsys.readouterr().err.strip()
            assert "\n" not in line
            assert line.startswith((f"{name}=", f"{name}[0]")), (name, value, line)
            said = (describe(setting.hint), "did you mean", "takes one", "choose among", "group")
            assert any(words in line for words in said), line
            count += 1
        assert main([command, *REQUIRED, f"--{name}.more", "1"]) == 2, name
        assert main([command, *REQUIRED, f"--{name}x", "1"]) == 2, name
        for line in capsys.readouterr().err.strip().splitlines():
            assert line.startswith(f"{name}")
        count += 2
    assert list(tmp_path.iterdir()) == []
    fault(f"{count} settings of {command} that are none, or are of another type", "one line with the name each, exit 2", "-")


@pytest.mark.parametrize("every", SHARE)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_in_yaml_too(command, every, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    count = 0
    required = {"model": {"name_or_path": "base"}, "data": {"train": "rows.jsonl"}, "run": {"output": "run"}}
    for name, setting in list(settings_of(COMMANDS[command]).items())[::every]:
        wrong = {"no": {"such": 1}} if get_origin(setting.hint) is not dict else [1]
        settings = {group: dict(values) for group, values in required.items()}
        node = settings
        *groups, leaf = name.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = wrong
        assert main([command, write(tmp_path / "a.yaml", settings)]) == 2, name
        line = capsys.readouterr().err.strip()
        assert "\n" not in line
        assert name in line, (name, line)
        count += 1
    fault(f"{count} settings of {command} in YAML that are of another type", "one line with the name each, exit 2", "-")
