"""Rows of one prompt stay on one side of the split, and what both sides share is said."""

import pytest

from hydra_ppo.cli.commands import load_rows
from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.rows import (
    PreferenceRow,
    PromptRow,
    load_preferences,
    load_prompts,
    prompt_key,
    repeats,
    split_held_out,
)
from hydra_ppo.errors import ConfigError
from tests.hydra_ppo.test_data import PLAIN, data, pair, write


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(100, 0.05, 5), (100, 0, 0), (10, 0.01, 1), (1, 0.5, 0), (2, 0.9, 1), (0, 0.5, 0)]
)
def test_split_held_out(count, fraction, held_out):
    rows = list(range(count))
    train, held = split_held_out(rows, fraction, seed=1)
    assert len(held) == held_out
    assert sorted(train + held) == rows
    assert (train, held) == (sorted(train), sorted(held))
    assert split_held_out(rows, fraction, seed=1) == (train, held)


def test_split_depends_on_the_seed():
    assert split_held_out(range(100), 0.1, 1) != split_held_out(range(100), 0.1, 2)
    with pytest.raises(ConfigError, match=r"eval_fraction=1 must lie in \[0, 1\)"):
        split_held_out([1], 1, 0)


def rows_of(*sizes):
    """Preference rows of prompts that have so many rows each, in turns."""
    rows = [(prompt, number) for prompt, size in enumerate(sizes) for number in range(size)]
    return [
        PreferenceRow(f"prompt  {prompt}\n" if number % 2 else f"prompt {prompt}", "", "", (prompt,), (number,), ())
        for prompt, number in sorted(rows, key=lambda row: row[::-1])
    ]


@pytest.mark.parametrize(
    ("sizes", "fraction", "held_out"),
    [
        ((4,) * 25, 0.05, 4),  # 5 of 100 rows cannot be had
        ((4,) * 25, 0.5, 48),
        ((10, 10, 10, 10), 0.02, 10),  # one prompt at least
        ((1, 99), 0.05, 1),
        ((99, 1), 0.9, 99),  # 90 of 100: 99 is nearer than 1
        ((3, 3, 3, 7), 0.44, 7),
        ((5,), 0.5, 0),  # a single prompt cannot be on both sides
        ((2, 2), 0.9, 2),  # one prompt stays to train on
        ((2, 3), 0, 0),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_prompt_stay_together(sizes, fraction, held_out, seed):
    rows = rows_of(*sizes)
    train, held = split_held_out(rows, fraction, seed)
    assert len(held) == held_out
    assert sorted(train + held, key=rows.index) == rows
    assert not {prompt_key(row) for row in train} & {prompt_key(row) for row in held}
    assert (train, held) == split_held_out(rows, fraction, seed)


def test_the_split_draws_prompts_and_not_the_first_ones():
    rows = rows_of(*(4,) * 25)
    held = [{row.prompt_ids for row in split_held_out(rows, 0.2, seed)[1]} for seed in range(20)]
    assert len(set().union(*held)) == 25


def test_prompts_are_one_but_for_spaces_and_by_ids_where_there_is_no_text():
    assert prompt_key(PromptRow("a  b\n", (1,))) == prompt_key(PreferenceRow("a b", "", "", (2,), (), ())) == "a b"
    assert prompt_key(PromptRow("", (1, 2))) == (1, 2)


def test_rows_that_come_again_are_counted():
    rows = load_preferences([pair(), pair("P:"), pair(), pair(chosen=" no", rejected=" yes")], PLAIN, data()).rows
    assert repeats(rows) == {"the same as an earlier row": 1, "an earlier row has the same answers the other way round": 1}
    prompts = load_prompts([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], PLAIN, data()).rows
    assert repeats(prompts) == {"the prompt of an earlier row": 1}


def load_both(tmp_path, train, evaluation, load=load_preferences, **settings):
    paths = {"train": write(tmp_path / "train.jsonl", train)}
    if evaluation is not None:
        paths["eval"] = write(tmp_path / "eval.jsonl", evaluation)
    return load_rows(load, PLAIN, DataSettings(**paths, **settings), seed=0)


def test_held_out_data_that_shares_prompts_is_counted(tmp_path):
    train = [pair(f"{i}:") for i in range(4)]
    shared = [pair("1:", " maybe"), pair("3: ", " maybe"), pair("7:")]
    assert load_both(tmp_path, train, shared)[2][-1] == "data.eval: 2 of 3 rows have a prompt that data.train has too"
    assert not [note for note in load_both(tmp_path, train, [pair("7:")])[2] if "too" in note]
    notes = load_both(tmp_path, train, [{"prompt": "2:"}], load_prompts)[2]
    assert notes[-1] == "data.eval: 1 of 1 rows have a prompt that data.train has too"


def test_what_is_held_out_of_repeated_prompts_is_said(tmp_path):
    rows = [pair(f"{i % 5}:", f" yes {i}") for i in range(20)]
    train, held, notes = load_both(tmp_path, rows, None, eval_fraction=0.2)
    assert (len(train), len(held)) == (16, 4)
    assert notes == [
        "data.train: 20 of 20 rows are used",
        "held out: 4 of 20 rows, with 1 of 5 prompts; rows of one prompt stay together",
    ]


def test_rows_that_hold_several_pairs_are_counted_as_such(tmp_path):
    rows = [{"prompt": f"{i}:", "responses": [" a", " b", " b"]} for i in range(2)]
    notes = load_both(tmp_path, rows, None, format="ranked", eval_fraction=0)[2]
    assert notes == [
        "data.train: 2 rows hold 6 pairs: 4 are used",
        "data.train: 2 of 6 pairs: chosen equals rejected",
        "data.train: 2 of 4 rows: the same as an earlier row",
    ]
