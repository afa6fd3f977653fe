"""Completion, in the shells themselves."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess

import pytest

from hydra_ppo.cli import completion
from hydra_ppo.cli.main import main


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """What the command prints for each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in completion.SHELLS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(shown.getvalue())
    return folder


def bash(scripts, *words: str) -> list[str]:
    """Let bash complete the last word."""
    typed = " ".join(f"'{word}'" for word in words)
    code = f"source {scripts / 'bash'}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _hydra_ppo; "
    code += r"printf '%s\n' ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=scripts)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_knows_commands_settings_words_and_files(scripts):
    assert bash(scripts, "hydra-ppo", "re") == ["report", "reward-eval"]
    assert {"plan", "profile", "ppo"} <= set(bash(scripts, "hydra-ppo", "p"))  # also those of entry points
    assert bash(scripts, "hydra-ppo", "ppo", "--kl.co") == ["--kl.coef"]
    assert bash(scripts, "hydra-ppo", "ppo", "--advantage", "r") == ["rloo", "reinforce"]
    assert bash(scripts, "hydra-ppo", "sft", "--model.gradient_checkpointing", "") == ["true", "false"]
    assert bash(scripts, "hydra-ppo", "ppo", "x.yaml", "--res") == ["--resume"]
    assert bash(scripts, "hydra-ppo", "export", "--adap") == ["--adapter-only"]
    assert bash(scripts, "hydra-ppo", "inspect", "fi") == ["fish"]  # a file that is there


def test_every_setting_of_ppo_is_completed(scripts):
    from hydra_ppo.config.reading import settings_of
    from hydra_ppo.config.settings import PPOConfig

    assert {f"--{name}" for name in settings_of(PPOConfig)} <= set(bash(scripts, "hydra-ppo", "ppo", "--"))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_script(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: apt-get install {shell}")
    start = "autoload -U compinit; compinit -u; " if shell == "zsh" else ""
    done = subprocess.run([shell, "-c", f"{start}source {scripts / shell}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if shell == "fish":
        code = f"source {scripts / shell}; complete -C 'hydra-ppo ppo --advantage r'"
        found = subprocess.run([shell, "-c", code], capture_output=True, text=True).stdout.split()
        assert found == ["reinforce", "rloo"]


def test_other_shells_are_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "tcsh" in err) == (1, True)
