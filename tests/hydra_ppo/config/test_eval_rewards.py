"""`eval_rewards` among the settings: paths of a moved run, names, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hydra_ppo.config.paths import for_folder, read_settings
from hydra_ppo.config.reading import as_values
from hydra_ppo.config.settings import DataSettings, PPOConfig, RewardSettings, RewardSource
from hydra_ppo.config.writing import render_yaml
from hydra_ppo.errors import ConfigError
from tests.training import ppo_config


def test_a_classifier_that_judges_is_named_from_the_run_folder(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    config = ppo_config(eval_rewards=[RewardSource("classifier", "judge"), RewardSource("function", "judge:f")])
    values = for_folder(as_values(config), tmp_path / "run")
    assert [source["target"] for source in values["eval_rewards"]] == ["../judge", "judge:f"]
    mark = {name: values.pop(name) for name in ("paths_are_relative_to",)}
    text = f"paths_are_relative_to: {mark['paths_are_relative_to']}\n" + render_yaml(PPOConfig, values)
    (tmp_path / "run" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "run")
    found = read_settings(tmp_path / "run" / "config.yaml")
    assert found["eval_rewards"][0]["target"] == str(tmp_path / "judge")


def test_sources_have_the_names_of_their_settings():
    config = ppo_config(eval_rewards=[RewardSource("function", "a:b")])
    assert [name for name, _ in config.named_sources()] == ["reward.sources[0]", "eval_rewards[0]"]
    assert config.evaluators.names == ["b"]
    assert config.evaluators.time_limit == config.reward.time_limit
    assert ppo_config().evaluators is None


def test_a_source_without_weight_may_judge_too():
    silent = RewardSettings(sources=[RewardSource(), RewardSource("function", "a:b", 0.0)])
    ppo_config(reward=silent, eval_rewards=[RewardSource("function", "a:b")])
    with pytest.raises(ConfigError, match=r"eval_rewards\[0\]: the head is reward.sources\[0\], which training raises"):
        ppo_config(reward=silent, eval_rewards=[RewardSource()])


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"holds none; name data.eval"):
        ppo_config(eval_rewards=[RewardSource("function", "a:b")], data=DataSettings(train="x", eval_fraction=0.0))
    with pytest.raises(ConfigError, match="name='length_r2' is that of the metric reward/length_r2"):
        replace(RewardSettings(), sources=[RewardSource("function", "a:length_r2")])
