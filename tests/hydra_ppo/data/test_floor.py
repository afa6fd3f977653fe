"""Floor pairs: what each corruption does to token ids, that it never gives the chosen answer back, and that it repeats."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from hydra_ppo.data.floor import FloorPairs, other_prompt, random_tokens, repeated, shuffled, truncated
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError

END = 2
LONG = (*range(10, 40), END)  # 30 tokens and the end
KINDS = ["other-prompt", "truncated", "shuffled", "repeated", "random-tokens"]


def row(prompt: tuple[int, ...], chosen: tuple[int, ...]) -> PreferenceRow:
    return PreferenceRow(str(prompt), str(chosen), "", prompt, chosen, (99, END))


def rows() -> list[PreferenceRow]:
    return [row((5, i % 7), tuple(range(10 + i, 13 + i + i % 9)) + (END,)) for i in range(40)]


def test_truncated_keeps_three_tenths_and_the_end():
    assert truncated(LONG) == (*range(10, 19), END)
    assert truncated((7, 8, 9, END)) == (7, END)
    assert truncated((7, END)) is None
    assert truncated((END,)) is None


def test_shuffled_moves_pieces_and_keeps_their_tokens():
    for seed in range(20):
        found = shuffled(LONG, Random(seed))
        assert found[-1] == END
        assert sorted(found) == sorted(LONG)
        assert found != LONG
        # Pieces of eight stay whole: within each, tokens count upwards.
        steps = [b - a for a, b in pairwise(found[:-1])]
        assert sum(step != 1 for step in steps) <= 3
    assert sorted(shuffled((7, 8, END), Random(0))[:2]) == [7, 8]
    assert shuffled((7, 8, END), Random(0)) == (8, 7, END)
    assert shuffled((7, 7, 7, END), Random(0)) is None
    assert shuffled((7, END), Random(0)) is None


def test_repeated_says_a_piece_to_the_end():
    for seed in range(20):
        found = repeated(LONG, Random(seed))
        assert len(found) == len(LONG)
        assert found[-1] == END
        start = next(i for i in range(30) if found[i] != LONG[i])
        size = next(size for size in range(1, 9) if found[start] == LONG[start - size])
        assert all(found[i] == found[i - size] for i in range(start, 30))
    assert repeated((7, 8, END), Random(0)) == (7, 7, END)
    assert repeated((7, 7, END), Random(0)) is None
    assert repeated((7, END), Random(0)) is None


def test_random_tokens_are_of_the_vocabulary_and_as_many():
    found = random_tokens(LONG, [50, 51, END], Random(0))
    assert len(found) == len(LONG)
    assert found[-1] == END
    assert set(found[:-1]) == {50, 51}
    assert random_tokens((7, END), [7, END], Random(0)) is None
    assert random_tokens((END,), [7], Random(0)) is None


def test_another_prompt_and_another_answer():
    one, same, other = row((1,), (7, END)), row((1, 3), (7, END)), row((2,), (8, END))
    assert other_prompt(one, [one, same, other], Random(0)) == (8, END)
    assert other_prompt(one, [one, same], Random(0)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_a_kind(kind):
    given = rows()
    floor = FloorPairs(given, [kind], seed=3)
    known = {(r.prompt_ids, r.chosen_ids) for r in given}
    found = [floor[number] for number in range(200)]
    assert all((pair.prompt_ids, pair.chosen_ids) in known for pair in found)
    assert all(pair.chosen_ids != pair.rejected_ids for pair in found)
    assert all(pair.rejected_ids[-1] == END for pair in found)
    assert len({pair.chosen_ids for pair in found}) > 20
    if kind != "other-prompt":
        assert all(len(pair.rejected_ids) <= len(pair.chosen_ids) for pair in found)


def test_the_same_pairs_in_any_order():
    floor = FloorPairs(rows(), KINDS, seed=3)
    first = [floor[number] for number in range(30)]
    again = FloorPairs(rows(), KINDS, seed=3)
    assert [again[number] for number in reversed(range(30))] == first[::-1]
    other = FloorPairs(rows(), KINDS, seed=4)
    assert [other[number] for number in range(30)] != first


def test_all_kinds_come():
    given = rows()
    floor = FloorPairs(given, KINDS, seed=0)
    lengths = [len(floor[n].rejected_ids) - len(floor[n].chosen_ids) for n in range(100)]
    assert any(length < 0 for length in lengths)
    assert any(length == 0 for length in lengths)


def test_rows_that_a_kind_cannot_change_are_passed_over():
    mixed = [row((1,), (7, END)), row((2,), (8, END)), row((3,), (7, 8, 9, END))]
    floor = FloorPairs(mixed, ["truncated"], seed=0)
    assert {floor[n].chosen_ids for n in range(20)} == {(7, 8, 9, END)}


@pytest.mark.parametrize("kind", ["other-prompt", "truncated", "shuffled", "repeated"])
def test_a_kind_that_changes_nothing_is_refused(kind):
    with pytest.raises(ConfigError, match=rf"floor_kinds=\['{kind}'\]: '{kind}' changes no answer of data.train; leave it out"):
        FloorPairs([row((1,), (7, END))] * 3, [kind], seed=0)
