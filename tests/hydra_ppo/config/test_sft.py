"""Settings of reward training that contradict each other, or that nothing reads, are one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import RewardSource
from hydra_ppo.errors import ConfigError
from tests.faults.project import make_project, ppo_settings, records, sft_settings, write
from tests.training import sft_config

DOCS = Path(__file__).parents[3] / "docs"
READ = "has nothing to do with"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reward_heads": 0}, "reward_heads=0 must be greater than 0"),
        ({"reward_heads": 3, "head_share": 0.0}, "head_share=0.0 must be greater than 0"),
        ({"reward_heads": 3, "head_share": 1.2}, "head_share=1.2 must be at most 1"),
        ({"head_share": 0.5}, f"head_share=0.5 {READ} one reward head; set reward_heads above 1"),
        ({"advantage_bound": 0}, "advantage_bound=0 must be greater than 0"),
        ({"advantage_bound": 3.0}, f"advantage_bound=3.0 {READ} reward_loss='bradley-terry'"),
        ({"reward_coef": 0.0, "reward_heads": 3}, f"reward_heads=3 {READ} reward_coef=0"),
        ({"reward_coef": 0.0, "reward_loss": "margin"}, f"reward_loss='margin' {READ} reward_coef=0"),
        ({"reward_coef": 0.0, "floor_share": 0.5}, f"floor_share=0.5 {READ} reward_coef=0"),
        ({"reward_coef": 0.0, "floor_steps": 2}, f"floor_steps=2 {READ} reward_coef=0"),
        ({"floor_share": -0.1}, "floor_share=-0.1 must not be negative"),
        ({"floor_share": 1.0}, "floor_share=1.0 must be below 1"),
        ({"floor_share": 0.01}, "floor_share=0.01 gives 0 floor pairs in a batch_size of 8"),
        ({"floor_share": 0.99}, "floor_share=0.99 gives 8 floor pairs in a batch_size of 8"),
        ({"floor_steps": -1}, "floor_steps=-1 must not be negative"),
        ({"floor_steps": 4, "max_steps": 4}, "floor_steps=4 leaves no step of max_steps=4 to train on preferences"),
        ({"floor_share": 0.25, "floor_kinds": []}, "floor_kinds=[] names no kind"),
        ({"floor_share": 0.25, "floor_kinds": ["repeated", "repeated"]}, "names a kind twice"),
        ({"floor_kinds": ["repeated"]}, f"floor_kinds=['repeated'] {READ.removesuffix(' with')} without floor pairs"),
    ],
)
def test_one_line(changes, line):
    with pytest.raises(ConfigError) as error:
        sft_config(**changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_how_many_steps_and_pairs():
    config = sft_config(floor_share=0.25, floor_steps=3, epochs=2)  # batches of 8: 6 of the data, 2 floor pairs
    assert (config.data_pairs, config.floor_pairs) == (6, 2)
    assert config.steps(13) == 3 + 2 * 3  # 6 + 6 + 1 of an epoch
    assert [config.floor_beside(pairs) for pairs in (6, 3, 1)] == [2, 1, 0]
    assert replace(config, max_steps=5).steps(13) == 5
    plain = sft_config(epochs=2)
    assert (plain.data_pairs, plain.floor_pairs, plain.has_floor, plain.steps(13)) == (8, 0, False, 4)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"kind": "head", "aggregate_coef": 0.5}, "aggregate_coef=0.5 has nothing to do with aggregate='mean'"),
        (
            {"kind": "head", "aggregate": "minimum", "aggregate_coef": 0.5},
            "aggregate_coef=0.5 has nothing to do with aggregate='minimum'",
        ),
        ({"kind": "head", "aggregate": "lcb", "aggregate_coef": -1.0}, "aggregate_coef=-1.0 must not be negative"),
        ({"kind": "function", "target": "a:b", "aggregate": "lcb"}, "aggregate='lcb' does not go with kind='function'"),
    ],
)
def test_aggregates_that_make_no_sense(source, line):
    with pytest.raises(ConfigError) as error:
        RewardSource(**source)
    assert line in str(error.value)


BLOCKS = re.findall(r"```yaml\n# (sft|ppo)[^\n]*\n(.*?)```", (DOCS / "reward-models.md").read_text(), flags=re.S)


@pytest.mark.parametrize(("command", "block"), [block for block in BLOCKS if block[0] == "sft"])
def test_the_examples_of_the_docs_run(command, block, tmp_path):
    folder = make_project(tmp_path)
    rows = [json.loads(line) | {"margin": 0.5} for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = yaml.safe_load(block)
    made = sft_settings(folder, "sft", **given, max_steps=given.get("floor_steps", 0) + 1)
    assert main([command, write(tmp_path / "sft.yaml", made)]) == 0
    (ppo,) = [yaml.safe_load(text) for name, text in BLOCKS if name == "ppo"]
    if given.get("reward_heads", 1) > 1:
        made = ppo_settings(folder, "ppo", steps=1) | ppo | {"model": {"name_or_path": str(folder / "sft")}}
        assert main(["ppo", write(tmp_path / "ppo.yaml", made)]) == 0
        steps = [found for found in records(folder / "ppo") if found["step"] > 0]
        assert steps[0]["reward/head/spread"] > 0
