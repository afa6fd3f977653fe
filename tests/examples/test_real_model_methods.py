"""Rows of methods on the real model: what pairs are made of rated answers, and what the table says of finished runs."""

from __future__ import annotations

import json

import pytest

from examples.real_model import methods

RATED = [{"prompt": f"p{i}", "responses": ["a", "b", "c", "d"], "ratings": [0.0, 0.5, -0.25, 0.5]} for i in range(200)]


def test_pairs_furthest_apart_come_first_and_equals_make_none():
    pairs = [(pair["chosen"], pair["rejected"]) for pair in methods.pairs_of(RATED[0], 9)]
    assert pairs == [("b", "c"), ("d", "c"), ("b", "a"), ("d", "a"), ("a", "c")]
    assert methods.pairs_of(RATED[0], 1) == [{"prompt": "p0", "chosen": "b", "rejected": "c"}]
    assert methods.pairs_of({"prompt": "p", "responses": ["a", "b"], "ratings": [1.0, 1.0]}, 2) == []


def test_a_quarter_of_the_labels_is_wrong_and_held_out_prompts_are_right(tmp_path):
    rated = tmp_path / "rated.jsonl"
    rated.write_text("".join(json.dumps(row) + "\n" for row in RATED))
    for seed in (0, 1):
        methods.write_noisy(rated, tmp_path, seed)
    right, first, second = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("right.jsonl", "noisy-0.jsonl", "noisy-1.jsonl")
    )
    assert all(pair["rejected"] == "c" for pair in right)
    assert len(right) == 2 * methods.HELD_OUT
    assert len(first) == 2 * (len(RATED) - methods.HELD_OUT)
    assert not {pair["prompt"] for pair in right} & {pair["prompt"] for pair in first}
    for noisy in (first, second):
        assert sum(pair["chosen"] == "c" for pair in noisy) / len(noisy) == pytest.approx(methods.NOISE, abs=0.08)
    assert first != second


def finished(folder, name: str, after: float, steps=()) -> None:
    (folder / name).mkdir()
    numbers = {"eval_scores_before": 0.5, "eval_scores_after": after, "eval_kl": 4.0, "eval_repeated_4grams_after": 0.01}
    (folder / name / "summary.json").write_text(json.dumps(numbers))
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_the_table_compares_seed_by_seed(tmp_path):
    for seed, (gae, rloo) in enumerate(((1.0, 1.2), (2.0, 2.4))):
        finished(tmp_path, f"gae-{seed}", gae)
        finished(tmp_path, f"rloo-{seed}", rloo)
    rows = methods.table(tmp_path, ["gae", "rloo", "ptx"], [0, 1, 2]).splitlines()[2:]
    assert rows[0] == "| gae | 2 | 0.500 ± 0.000 | 1.500 ± 0.500 |  | 4.000 ± 0.000 | 1.000 ± 0.000 |"
    assert rows[1].split(" | ")[3:5] == ["1.800 ± 0.600", "0.300 ± 0.100"]
    assert rows[2] == "| ptx | 0 |  |  |  |  |  |"


def test_rows_on_heads_are_judged_by_vader(tmp_path):
    finished(tmp_path, "one-head-0", 9.0, [{"eval/reward/reward": 0.25}, {}, {"eval/reward/reward": 0.75}])
    finished(tmp_path, "rehearsal-0", 9.0, [{"eval/reward/reward": 0.25}, {"eval/reward/reward": 1.0}])
    rows = methods.table(tmp_path, ["one-head", "rehearsal"], [0]).splitlines()[2:]
    assert rows[0].startswith("| one-head | 1 | 0.250 | 0.750 |  |")
    assert rows[1].startswith("| rehearsal | 1 | 0.250 | 1.000 | 0.250 |")


def test_an_unknown_row_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["methods.py", "--rows", "gae,dpo"])
    with pytest.raises(SystemExit) as info:
        methods.main()
    assert info.value.code == 2
    assert "rows='dpo' is unknown; choose among gae, " in capsys.readouterr().err
