"""The learning comparison trains, judges and goes on where it stopped; its quality is measured, not tested."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from rich.console import Console

from hydra_ppo.cli.main import main
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.learning import compare as learning
from hydra_ppo.profiling.learning import setups
from hydra_ppo.profiling.learning.compare import Outcome, compare_learning, learning_table
from hydra_ppo.profiling.learning.overoptimisation import settings as over_optimisation_settings
from hydra_ppo.profiling.learning.overoptimisation import verdict
from hydra_ppo.profiling.learning.picture import trunk_figure
from hydra_ppo.profiling.learning.shared import spread
from hydra_ppo.quickstart import run as quickstart


def test_every_method_is_trained_once_and_judged_against_one_opponent(small, tmp_path):
    said = []
    outcomes = compare_learning(tmp_path, ("full", "lora", "hydra"), (0,), say=said.append)
    assert [outcome.method for outcome in outcomes] == ["full", "lora", "hydra"]
    assert len(said) == 3
    for outcome in outcomes:
        assert 0 <= outcome.win_rate <= 1
        assert 0 <= outcome.reward_accuracy <= 1
    assert {p.name for p in (tmp_path / "seed-0").iterdir()} == {
        *("data", "base", "sft", "sft-alone", "reward-alone", "opponent.json", "full.json", "lora.json", "hydra.json"),
    }
    assert compare_learning(tmp_path, ("full", "lora", "hydra"), (0,), say=said.append) == outcomes
    assert len(said) == 3  # nothing was run again


def test_a_trunk_is_there_and_spared_by_the_update(small, tmp_path, monkeypatch):
    models, given = [], []
    whole = learning.build

    def build(method, load):
        model = whole(method, load)
        models.append(model)
        if model.trunk is not None:
            put = model.trunk.put

            def noted(states, *others):
                given.append(states is not None)
                return put(states, *others)

            monkeypatch.setattr(model.trunk, "put", noted)
        return model

    monkeypatch.setattr(learning, "build", build)
    outcomes = compare_learning(tmp_path, ("hydra",), (0,), trunk_layers=(0, 2), say=lambda text: None)
    assert [outcome.trunk_layers for outcome in outcomes] == [0, 2]
    assert outcomes[0].gold_before == outcomes[1].gold_before  # no adapter has a say in the reference
    assert {path.name for path in (tmp_path / "seed-0").glob("*.json")} == {
        "hydra.json",
        "hydra-trunk-2.json",
        "opponent.json",
    }
    plain, cut = models
    assert plain.trunk is None
    assert cut.trunk.count == 2
    assert any(given)  # the critic's pass and the update begin above it
    adapted = [{name.split(".layers.")[1][0] for name in model.role_parameters("actor")} for model in models]
    assert adapted == [set("0123"), {"3"}]
    assert compare_learning(tmp_path, ("hydra",), (0,), trunk_layers=(0, 2), say=print) == outcomes
    assert len(models) == 2  # nothing was run again


def test_a_result_from_before_there_were_trunks_reads_as_0(tmp_path):
    saved = asdict(Outcome("hydra", 0, 1.0, 2.0, 0.1, 0.5, 3.0, 0.9, 1.0))
    del saved["trunk_layers"]
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "hydra.json").write_text(json.dumps(saved))
    assert compare_learning(tmp_path, ("hydra",), (0,))[0].trunk_layers == 0


@pytest.mark.parametrize(
    ("methods", "trunk", "message"),
    [
        (("hydra",), 4, "trunk_layers=4 must be at least 0 and below the 3 decoder layers"),
        (("hydra",), -1, "trunk_layers=-1 must be at least 0"),
        (("hydra", "lora"), 1, "trunk_layers=1 is compared for the method 'hydra' alone, not for 'lora'"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(methods, trunk, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare_learning(tmp_path, methods, (0,), trunk_layers=(0, trunk))
    assert not list(tmp_path.iterdir())


def test_the_command_shows_and_draws_trunks(tmp_path, capsys):
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}").mkdir()
        for trunk, name in ((0, "hydra"), (2, "hydra-trunk-2")):
            row = Outcome("hydra", seed, 1.0, 2.0 + seed - trunk / 4, 0.1, 0.5, 3.0, 0.9, 100.0 - trunk + seed, trunk)
            (tmp_path / f"seed-{seed}" / f"{name}.json").write_text(json.dumps(asdict(row)))
    command = [
        "profile",
        "--learning",
        "--methods",
        "hydra",
        "--seeds",
        "0,1",
        "--trunk-layers",
        "0,2",
        "--output",
        str(tmp_path),
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["seed"], row["trunk_layers"]) for row in found] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert (tmp_path / "trunk.png").is_file()


def test_means_and_standard_errors_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 0.577"  # sqrt(((1 + 0 + 1) / 2) / 3)
    assert spread([0.5]) == "0.500"
    rows = [
        Outcome("hydra", seed, 1.0, 2.0 + seed + trunk, 0.1, 0.5, 3.0, 0.9, 20.0 + 10 * seed, trunk)
        for seed in (0, 1)
        for trunk in (0, 2)
    ]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(learning_table(rows))
    text = console.export_text()
    plain, cut = ([cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "hydra" in line)
    means = ["1.000 ± 0.000", "2.500 ± 0.500", "0.500 ± 0.000", "3.000 ± 0.000", "0.900 ± 0.000"]
    assert plain == ["hydra", "0", "2", *means, "25"]
    assert cut[:5] == ["hydra", "2", "2", "1.000 ± 0.000", "4.500 ± 0.500"]


def test_the_picture_has_the_means_and_standard_errors():
    rows = [
        Outcome("hydra", seed, 1.0, 2.0 + seed - trunk, 0.1, 0.5 + seed / 10, 3.0, 0.9, 1.0, trunk)
        for trunk in (2, 0)
        for seed in (0, 1)
    ]
    gold, wins = trunk_figure(rows).axes
    for axes, means, error in ((gold, [2.5, 0.5], 0.5), (wins, [0.55, 0.55], 0.05)):
        line, _, (bars,) = axes.containers[0]
        assert line.get_xdata().tolist() == [0, 2]
        assert line.get_ydata() == pytest.approx(means)
        ends = [y for (_, low), (_, high) in bars.get_segments() for y in (low, high)]
        assert ends == pytest.approx([y for m in means for y in (m - error, m + error)])


def test_savings_start_from_one_model_and_change_what_they_say(small, tmp_path):
    said = []
    outcomes = setups.compare_setups(tmp_path, "savings", ["defaults", "all three"], [0], say=said.append)
    assert [outcome.setup for outcome in outcomes] == ["defaults", "all three"]
    plain, saving = outcomes
    assert plain.gold_before != 0
    assert plain.drift is None
    assert saving.drift > 0  # the cache rounds, and that is measured
    assert 1 < plain.perplexity < 1000
    assert len(said) == 2
    assert setups.compare_setups(tmp_path, "savings", ["defaults", "all three"], [0], say=said.append) == outcomes
    assert len(said) == 2


def test_no_worse_by_hand():
    # mean -0.02, standard error 0.01 / sqrt(3) * ... of (-0.03, -0.02, -0.01): s = 0.01, se = 0.00577; -0.02 - 0.0115 = -0.0315
    assert setups.no_worse([-0.03, -0.02, -0.01], margin=0.032)
    assert not setups.no_worse([-0.03, -0.02, -0.01], margin=0.031)


def test_the_table_of_savings_compares_seed_by_seed():
    rows = [
        setups.Outcome(setup, seed, 1.0, after, 0.1, 0.8, 4.0, drift, 9.0, None, 60.0)
        for setup, drift, gold in (("defaults", None, (2.0, 2.2)), ("all three", 0.01, (1.9, 2.3)))
        for seed, after in enumerate(gold)
    ]
    console = Console(width=160, record=True)
    console.print(setups.setups_table(rows))
    text = console.export_text()
    assert "0.000 ± 0.100" in text  # of -0.1 and 0.1
    assert "not shown" in text
    assert "0.0100" in text


def test_a_verdict_by_hand():
    """Gold 1, 2, 3, 2.9, 2.7, 1: the gain is 2, a tenth of it lost at 2.8 or below, which step 8 is."""
    gold = [1.0, 2.0, 3.0, 2.9, 2.7, 1.0]
    records = [{"step": 2 * i, "eval/independent": value} for i, value in enumerate(gold)] + [{"step": 11}]
    alarms = [{"step": step, "name": "over_optimisation"} for step in (2, 6, 10)] + [{"step": 5, "name": "ratio"}]
    found = verdict(records, alarms)
    assert (found.before, found.best, found.best_step, found.lost_step) == (1.0, 3.0, 4, 8)
    assert (found.alarms, found.alarm_step, found.early) == ([2, 6, 10], 6, [2])
    assert found.lost_share == pytest.approx(0.05)
    quiet = verdict(records[:3], [])
    assert (quiet.lost_step, quiet.alarm_step, quiet.lost_share) == (None, None, None)


def test_the_settings_of_over_optimisation_are_the_quickstarts_without_a_penalty(tmp_path):
    found = over_optimisation_settings(tmp_path, 3, "many", tmp_path / "heads", 2, ["--steps", "7"])
    assert (found.kl.coef, found.steps, found.run.seed) == (0.0, 7, 3)
    assert found.model.name_or_path == str(tmp_path / "heads")
    assert found.eval_prompts == 2 * 366
    assert [source.target for source in found.eval_rewards] == ["hydra_ppo.profiling.learning.gold:gold"]
    assert found.rollout == quickstart.ppo_config(tmp_path, 3).rollout
