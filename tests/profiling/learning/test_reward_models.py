"""Rows on reward models are measured once and laid out seed by seed; what they show is measured, not tested."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.model.origin import Origin
from hydra_ppo.profiling.learning import head_rows, reward_rows, setups
from hydra_ppo.profiling.learning.reward_ground import NO_LABELS, Ground, Row, head_numbers, pair_members, slug
from hydra_ppo.profiling.learning.reward_models import TABLES, Kind, Measured, main, measure_rows, rows_table
from hydra_ppo.quickstart.corpus import gold_score
from hydra_ppo.rewards.head_training import LabelledPairs


def test_an_ensemble_is_measured_once_by_its_aggregate(small, tmp_path, monkeypatch):
    said, given, train = [], [], setups.train
    monkeypatch.setattr(setups, "train", lambda *arguments: given.append(arguments) or train(*arguments))
    (found,) = measure_rows(tmp_path, "ensembles", ["5 heads, minimum"], [0], 48, said.append)
    place = tmp_path / "seed-0" / "noise-25"
    assert json.loads((place / "sft-5" / "hydra.json").read_text())["reward_heads"] == 5
    ((_, name, changes, _),) = given
    (source,) = changes["reward"]["sources"]
    assert (name, source.aggregate, changes["model"]["name_or_path"]) == ("5 heads, minimum", "minimum", str(place / "sft-5"))
    better, worse = pair_members(place / "sft-5", place / "data" / "eval.jsonl")
    assert better.shape == (8, 5)
    margins = better.amin(dim=1) - worse.amin(dim=1)
    assert found.numbers["accuracy"] == (margins > 0).float().mean().item()
    assert found.numbers["member_accuracy"] == pytest.approx((better > worse).float().mean().item())
    assert 0 <= found.numbers["win_rate"] <= 1
    assert set(TABLES["ensembles"].columns) < set(found.numbers)
    assert measure_rows(tmp_path, "ensembles", ["5 heads, minimum"], [0], 48, said.append) == [found]
    assert (len(said), len(given)) == (1, 1)  # nothing was run again
    assert said[0].startswith("seed 0 5 heads, minimum: accuracy ")


def test_the_noise_of_an_ensemble_is_a_quarter(small, tmp_path):
    place = Ground(tmp_path, 0, 48).place(reward_rows.NOISE)
    rows = [json.loads(line) for line in (place / "data" / "train.jsonl").read_text().splitlines()]
    better = [gold_score(row["prompt"], row["chosen"]) > gold_score(row["prompt"], row["rejected"]) for row in rows]
    assert (len(rows), better.count(False)) == (48, 12)
    assert not (tmp_path / "noise-25" / "inputs.partial").exists()


def test_what_was_killed_while_it_was_written_is_written_anew(small, tmp_path):
    ground = Ground(tmp_path, 0, 48)
    place = ground.place(0.1)
    whole = (place / "data" / "train.jsonl").read_text()
    (place / "base").replace(place / "inputs.partial")  # as if it had ended just before the last move
    (place / "data" / "train.jsonl").write_text("half a li")
    assert ground.place(0.1) == place
    assert (place / "data" / "train.jsonl").read_text() == whole
    assert {path.name for path in place.iterdir()} == {"data", "base"}


def test_each_loss_has_a_run_of_its_own(small, tmp_path):
    found = measure_rows(tmp_path, "losses", list(TABLES["losses"].rows), [0], 48, lambda text: None)
    assert [one.row for one in found] == ["bradley-terry", "advantage", "divergent"]
    place = tmp_path / "seed-0" / "noise-25"
    for one in found:
        run = place / ("sft" if one.row == "bradley-terry" else f"sft-{one.row}")
        assert f"reward_loss: {one.row}" in (run / "config.yaml").read_text()
        assert set(TABLES["losses"].columns) < set(one.numbers)
    assert len({one.numbers["score_mean"] for one in found}) == 3
    # Where all labels are turned round, what was right is wrong, and as sure of itself.
    run, pairs = place / "sft", place / "data" / "eval.jsonl"
    turned = head_numbers(run, pairs, seed=0, noise=1.0)
    better, worse = pair_members(run, pairs)
    p = (better - worse)[:, 0].abs().sigmoid()
    assert p.max() < 0.55  # one bin
    hits = (better < worse).float().mean()
    assert turned["ece_noisy"] == pytest.approx((hits - p.mean()).abs().item(), abs=1e-6)


def test_labels_are_seen_as_often_with_floor_pairs_as_without(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [reward_rows.passes(count) for count in (64, 256, 1000, 4000)] == [8, 8, 4, 1]
    configs, train = [], reward_rows.train_sft
    monkeypatch.setattr(reward_rows, "train_sft", lambda config, output: configs.append(config) or train(config, output))
    names = [f"256 labels, {name}" for name in ("no floor", "random tokens")]
    found = measure_rows(Path("runs"), "floor", names, [0], 48, lambda text: None)
    assert all(set(one.numbers) == {"accuracy", "ece", "score_sd", "seconds"} for one in found)
    seed = Path("runs/seed-0")
    for config in configs:
        assert config.model.name_or_path == str(seed / "noise-50" / "sft-alone")
        assert config.data.train == str(seed / "labels-10" / "train-256.jsonl")
        assert (config.sft_coef, config.epochs) == (0.0, 8)
    assert [config.floor_share for config in configs] == [0.0, 0.125]
    assert configs[1].floor_kinds == ["random-tokens"]
    assert "reward_coef: 0.0" in (seed / "noise-50" / "sft-alone" / "config.yaml").read_text()
    assert {path.name for path in seed.iterdir()} == {"settings.json", "noise-50", "labels-10", "floor"}


def test_few_labels_are_the_first_of_many_and_no_text_of_the_language_model(small, tmp_path):
    ground = Ground(tmp_path, 0, 48)
    few, all_of_them = (ground.labels(count, 0.1).read_text().splitlines() for count in (8, 4000))
    assert (len(few), few) == (8, all_of_them[:8])
    read = set((ground.place(NO_LABELS) / "data" / "train.jsonl").read_text().splitlines())
    assert not read & set(all_of_them)


def test_heads_are_trained_on_states_of_a_language_model(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(head_rows, "FIRST", 12)
    names = ["refitted, 64 pairs", "one pass, 64 pairs", "active, 256 labels", "random, 256 labels"]
    found = measure_rows(Path("runs"), "heads", names, [0], 48, lambda text: None)
    assert all(0 <= one.numbers["accuracy"] <= 1 for one in found)
    assert all(one.numbers["processor"] > 0 for one in found)
    about = json.loads((Path("runs/seed-0") / "states" / "features.json").read_text())
    assert (about["pairs"], about["run"]) == (48, str(Path("runs/seed-0") / "noise-50" / "sft-alone"))
    states = head_rows.stored_states(Ground(Path("runs/seed-0"), 0, 48))
    assert (len(states.labels), len(states.held_out)) == (48, 8)


def synthetic(count=400, held_out=100, seed=0):
    """States of 8 numbers, of which the first two say which answer is better."""
    random_numbers = np.random.default_rng(seed)
    states = random_numbers.normal(size=(count + held_out, 2, 8))
    worse = states[:, 0, :2].sum(axis=1) < states[:, 1, :2].sum(axis=1)
    states[worse] = states[worse][:, ::-1]
    rows = list(range(count + held_out))
    origin = Origin(None, None, 1, 8, None, None, "float32")
    groups = [row // 2 for row in rows]
    return head_rows.States(LabelledPairs(states.astype(np.float16)), groups, rows[:count], rows[count:], origin)


def test_a_refit_is_where_the_gradient_is_zero():
    z = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta = head_rows.refit(z, 0.1).requires_grad_()
    (torch.nn.functional.softplus(-(z @ theta)).sum() + 0.05 * theta.square().sum()).backward()
    assert theta.grad.abs().max() < 1e-7
    one = head_rows.refit(torch.ones(1, 1, dtype=torch.float64), 1.0).item()
    assert one == pytest.approx(1 / (1 + np.exp(one)))  # theta = s(-theta)
    assert torch.isfinite(head_rows.refit(1e3 * z.abs(), 0.1)).all()  # far from where Newton's steps are short


def test_heads_learn_what_states_say():
    states = synthetic()
    for train in (head_rows._refitted, head_rows._one_pass, head_rows._fitted):
        margins, _ = train(300, states, 0)
        assert margins.shape == (100, 1)
        assert (margins > 0).float().mean() > 0.8


def test_active_and_random_picks_begin_alike_and_end_at_equal_counts(monkeypatch):
    states, seen, train = synthetic(), [], head_rows.train_heads
    monkeypatch.setattr(head_rows, "train_heads", lambda pairs, rows, *rest: seen.append(rows) or train(pairs, rows, *rest))
    for active in (True, False):
        head_rows._asked(active, 200, states, 3)
    active, at_random = seen[:3], seen[3:]
    assert [len(rows) for rows in active] == [len(rows) for rows in at_random] == [64, 128, 200]
    assert active[0] == at_random[0]
    assert set(active[1]) != set(at_random[1])
    assert all(len(set(rows)) == len(rows) for rows in seen)
    assert not any(set(rows) & set(states.held_out) for rows in seen)


def test_self_labelling_begins_with_its_share_and_is_judged_on_labels_that_are_right(monkeypatch):
    monkeypatch.setattr(head_rows, "WIDTHS", (8,))
    states = synthetic()
    pool, train, validation = head_rows._shares(states, 0)
    assert sorted([*pool, *train, *validation]) == states.labels
    assert len(train) + len(validation) == pytest.approx(60, abs=2)
    few, _ = head_rows._few(states, 0)
    margins, numbers = head_rows._self_labelled(states, 0)
    assert few.shape == margins.shape == (100, 5)
    assert 0 < numbers["labelled"] <= len(pool)
    assert numbers["agreement"] > 0.7


def test_differences_are_to_the_first_row_of_a_group_seed_by_seed():
    kind = Kind({name: Row(name[0], lambda ground: {}) for name in ("a1", "a2", "b1", "b2")}, {"x": "X", "y": "Y"}, ("x",))
    values = {"a1": (1.0, 2.0), "a2": (1.5, 2.3), "b1": (5.0,), "b2": (4.0, 9.0)}
    measured = [Measured(row, seed, {"x": x}) for row, found in values.items() for seed, x in enumerate(found)]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rows_table(kind, measured))
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert cells == [
        ["a1", "2", "1.500 ± 0.500", "-", "-"],
        ["a2", "2", "1.900 ± 0.400", "-", "0.400 ± 0.100"],
        ["b1", "1", "5.000", "-", "-"],
        ["b2", "2", "6.500 ± 2.500", "-", "-1.000"],
    ]
    assert list(rows_table(kind, [one for one in measured if one.row == "b2"]).columns[-1].cells) == ["-"]  # b1 is not there
    assert rows_table(kind, []).row_count == 0


def test_names_of_rows_make_names_of_files_that_differ():
    for kind in TABLES.values():
        names = [slug(name) for name in kind.rows]
        assert len(set(names)) == len(names)
        assert all(set(kind.compared) <= set(kind.columns) for _ in names)
    assert slug("64 labels, floor 0.125") == "64-labels-floor-0.125"


def test_a_folder_that_was_begun_with_other_sizes_is_refused(tmp_path):
    Ground(tmp_path, 0, 48).check()
    Ground(tmp_path, 0, 48).check()
    with pytest.raises(ConfigError, match=r"pairs=96 is not what .* was begun with, 48; give --pairs 48, or another --output"):
        Ground(tmp_path, 0, 96).check()


def test_what_is_wrong_on_the_command_line_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="rows='many heads' is unknown; choose among one head; 5 heads, mean"):
        main(["--table", "ensembles", "--rows", "many heads", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="pairs=0 must be at least 1"):
        main(["--table", "losses", "--pairs", "0", "--output", str(tmp_path)])


def test_a_row_that_fails_is_said_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fail(ground):
        raise NonFiniteError("loss is nan")

    rows = {"fails": Row("losses", fail), "goes": Row("losses", lambda ground: {"x": ground.seed + 0.5})}
    monkeypatch.setitem(TABLES, "losses", Kind(rows, {"x": "X"}, ("x",)))
    with pytest.raises(SystemExit, match="2 of 4 failed; the same command tries them again"):
        main(["--table", "losses", "--seeds", "0,1", "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "1.000 ± 0.500" in out
    assert err.count("fails failed: loss is nan") == 2


def test_the_command_shows_what_is_kept(tmp_path, capsys):
    for seed in (0, 1):
        Ground(tmp_path / f"seed-{seed}", seed, 4000).check()
        (tmp_path / f"seed-{seed}" / "losses").mkdir()
        for loss in ("bradley-terry", "divergent"):
            numbers = {key: random.Random(loss).random() + seed for key in TABLES["losses"].columns}
            (tmp_path / f"seed-{seed}" / "losses" / f"{loss}.json").write_text(json.dumps(numbers))
    main(
        [
            "--table",
            "losses",
            "--seeds",
            "0,1",
            "--pairs",
            "4000",
            "--rows",
            "bradley-terry;divergent",
            "--output",
            str(tmp_path),
        ]
    )
    text = capsys.readouterr().out
    assert "bradley-terry" in text
    assert "± 0.000" in text  # the differences are the same on both seeds
