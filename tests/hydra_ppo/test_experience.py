"""Batches: padding, shifting, cutting, and that nothing of a row is lost on the way."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.experience import Experience, FinishedExperience, ScoredExperience, split_by_length
from tests.families import PROMPTS, RESPONSES, experience


def rows_of(batch: Experience) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each row, read back from the shifted sequences."""
    sequences = batch.sequences()
    found = []
    for row, start in enumerate(sequences.prompt_lengths.tolist()):
        length = int(sequences.response_mask[row].sum())
        ids = sequences.input_ids[row].tolist()
        found.append((ids[:start], ids[start : start + length]))
    return found


def test_sequences_start_at_column_0_and_hold_every_token():
    assert rows_of(experience()) == list(zip(PROMPTS, RESPONSES, strict=True))
    assert experience().sequences().input_ids.shape == (3, 9)  # the longest row: 5 + 4 = 9, 2 + 6 = 8, 7 + 1 = 8


def test_positions_by_hand():
    sequences = experience().sequences()
    # prompts of 5, 2, 7 tokens: the state before response token r is at column length - 1 + r
    assert sequences.state_positions()[:, 0].tolist() == [4, 1, 6]
    assert sequences.state_positions()[1].tolist() == [1, 2, 3, 4, 5, 6]
    assert sequences.last_positions().tolist() == [8, 7, 7]  # 5 + 4 - 1, 2 + 6 - 1, 7 + 1 - 1


@pytest.mark.parametrize("rows", [[0], [1, 2], [2, 0], [0, 1, 2]])
def test_selected_rows_are_cut_to_size_and_keep_their_tokens(rows):
    values = torch.arange(18.0).view(3, 6)
    known = {"old_logprobs": -values, "ref_logprobs": values / 2, "old_values": values, "scores": torch.arange(3.0)}
    batch = ScoredExperience(**experience().parts(), **known)
    part = batch.select(rows)
    assert rows_of(part) == [(PROMPTS[i], RESPONSES[i]) for i in rows]
    assert part.prompt_ids.shape[1] == max(len(PROMPTS[i]) for i in rows)
    width = max(len(RESPONSES[i]) for i in rows)
    assert torch.equal(part.old_values, batch.old_values[rows][:, :width])
    assert torch.equal(part.old_logprobs, batch.old_logprobs[rows][:, :width])
    assert part.scores.tolist() == [float(i) for i in rows]
    assert part.sampler_logprobs is None


def test_minibatches_cover_every_row_once_per_epoch_in_a_new_order():
    batch = Experience.from_lists([[i] for i in range(3, 13)], [[2]] * 10, 0, torch.device("cpu"))
    seen = [p[0] for m in batch.minibatches(2, 4, torch.Generator().manual_seed(0)) for p, _ in rows_of(m)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(3, 13))
    assert seen[:10] != seen[10:]


def test_split_by_hand():
    lengths = [5, 9, 3, 9, 4]
    assert split_by_length(lengths, rows=2) == [[1, 3], [0, 4], [2]]
    # at most 10 padded tokens: 9 | 9 | 5 + 5 | 3
    assert split_by_length(lengths, rows=8, tokens=10) == [[1], [3], [0, 4], [2]]
    assert split_by_length([], rows=2) == []


def test_ended_looks_at_the_last_token():
    assert experience().ended([2]) == [True, False, False]
    assert experience().ended([46, 51]) == [False, True, True]


def test_finished_experience_is_cut_like_any_other():
    values = torch.arange(18.0).view(3, 6)
    known = {"old_logprobs": values, "ref_logprobs": values, "old_values": values, "scores": torch.zeros(3)}
    finished = ScoredExperience(**experience().parts(), **known).finished(values + 1, values + 2)
    assert isinstance(finished, FinishedExperience)
    minibatches = list(finished.minibatches(1, 2, torch.Generator().manual_seed(0)))
    assert [type(part) for part in minibatches] == [FinishedExperience] * 2
    assert all(torch.equal(part.returns, part.advantages + 1) for part in minibatches)
    assert finished.with_trunk(torch.ones(3, 9, 2)).select([1]).trunk.shape == (1, 8, 2)
    assert finished.trunk is None
