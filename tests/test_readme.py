"""README and first pages tell the truth: their settings load, their Python runs, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hydra_ppo.cli.flags import load_config, parse
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from tests.training import write_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FIRST_RUN, PYTHON = ((ROOT / "docs" / name).read_text() for name in ("first-run.md", "python.md"))
HUB_MODEL = "meta-llama/Llama-3.2-1B"


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.S)


@pytest.mark.parametrize("kind", [SFTConfig, PPOConfig])
def test_the_settings_load(kind, tmp_path):
    name = "sft.yaml" if kind is SFTConfig else "ppo.yaml"
    (text,) = [block for block in blocks("yaml", FIRST_RUN) if block.startswith(f"# {name}")]
    (tmp_path / name).write_text(text)
    config = load_config(kind, tmp_path / name)
    assert config.model.quantization == "nf4"


def test_the_python_runs(tmp_path, capsys):
    (code,) = blocks("python", PYTHON)
    assert code.count(HUB_MODEL) == 2
    base = write_model(tmp_path / "base")
    scope: dict[str, object] = {}
    exec(code.replace(HUB_MODEL, str(base)).replace('"bf16"', '"fp32"'), scope)
    model = scope["model"]
    received = {name for name, p in model.named_parameters() if p.grad is not None}
    assert received
    assert all(".actor." in name for name in received)


def test_the_commands_exist(capsys):
    lines = [line for page in (README, FIRST_RUN) for block in blocks("sh", page) for line in block.splitlines()]
    words = {line.split()[1] for line in lines if line.startswith("hydra-ppo ")}
    assert words == {"init", "sft", "ppo", "report", "inspect", "score", "generate", "export"}
    for word in words:
        assert main([word, "--help"]) == 0


def test_what_else_it_can_do_is_typed_right(tmp_path):
    """Every row of that table: settings that there are, commands that there are."""
    section = README.split("## What else it can do")[1].split("\n## ")[0]
    commands = re.findall(r"`hydra-ppo ([^`]*)`", section)
    assert len(commands) >= 13
    settings = {kind: next(b for b in blocks("yaml", FIRST_RUN) if b.startswith(f"# {kind}.yaml")) for kind in ("sft", "ppo")}
    for line in commands:
        command, *rest = line.split()
        if command in settings:
            path = tmp_path / f"{command}.yaml"
            path.write_text(settings[command])
            parse({"sft": SFTConfig, "ppo": PPOConfig}[command], command, [str(path), *rest[1:]])
        assert main([command, "--help"]) == 0


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in {
        name
        for names in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", README + FIRST_RUN, flags=re.M)
        for name in names
        if name
    }:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
