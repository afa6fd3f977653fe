"""Where defaults come from, as `--print-config` says it."""

from __future__ import annotations

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.config.evidence import evidence
from hydra_ppo.config.reading import settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig


@pytest.mark.parametrize("config", [SFTConfig, PPOConfig])
def test_each_source_stands_for_the_default_that_is_there(config):
    known = settings_of(config)
    for name, (value, source) in evidence(config).items():
        assert known[name].default == value, f"{name} has another default than {source} stands for"


def test_print_config_says_where_a_default_comes_from(capsys):
    assert main(["ppo", "--print-config"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("#", "").split())
    assert "(a float; default 0.02) Why: the beta of Hydra-RLHF, 2309.00754;" in printed
    assert main(["sft", "--print-config"]) == 0
    assert "default 0.1) Why: the gamma of Hydra-RLHF" in " ".join(capsys.readouterr().out.replace("#", "").split())
