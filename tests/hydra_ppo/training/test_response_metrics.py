"""What responses show by themselves, by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hydra_ppo.experience import Experience, split_by_length
from hydra_ppo.training.response_metrics import decoding_metrics, distinct_ngrams, length_r2, text_metrics


def test_distinct_2_by_hand():
    """1 2, 2 1, 1 2 and 1 2: four bigrams, two different ones."""
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert distinct_ngrams([[1], []], 2) is None


def test_length_r2_by_hand():
    """Scores that are a line over log length are explained whole; of 1, 2, 4 tokens with scores 0, 1, 0 nothing is."""
    lengths = [1, 2, 4, 8]
    assert length_r2([3 * math.log(n) - 1 for n in lengths], lengths) == pytest.approx(1.0)
    assert length_r2([-2 * math.log(n) for n in lengths], lengths) == pytest.approx(1.0)  # shorter is better, too
    assert length_r2([0.0, 1.0, 0.0], [1, 2, 4]) == pytest.approx(0.0)
    # logs -1, 0, 1 times log 2 about their mean; scores 0, 0, 3: covariance 3, 9 / (2 * 6) = 3 / 4
    assert length_r2([0.0, 0.0, 3.0], [1, 2, 4]) == pytest.approx(0.75)


@pytest.mark.parametrize(("scores", "lengths"), [([1.0, 2.0], [1, 2]), ([1.0] * 4, [1, 2, 3, 4]), ([1.0, 2.0, 3.0], [5, 5, 5])])
def test_length_r2_is_not_measured_where_nothing_varies(scores, lengths):
    assert length_r2(scores, lengths) is None


def test_decoding_by_hand():
    """One batch of 4 rows of 1, 1, 2, 4 tokens: 4, 2, 1 and 1 of 4 are unfinished; at the last two steps under half."""
    found = decoding_metrics([3, 3, 3, 3], [1, 1, 2, 4], 4)
    assert found["rollout/occupancy"] == pytest.approx((1 + 0.5 + 0.25 + 0.25) / 4)
    assert found["rollout/tail"] == pytest.approx(2 / 4)


def test_decoding_against_counting_steps():
    rng = random.Random(0)
    for together in (1, 3, 4, 10):
        prompts = [rng.randint(1, 5) for _ in range(10)]
        lengths = [rng.randint(1, 9) for _ in range(10)]
        shares = []
        for group in split_by_length(prompts, together):
            for step in range(max(lengths[row] for row in group)):
                shares.append(sum(lengths[row] > step for row in group) / len(group))
        found = decoding_metrics(prompts, lengths, together)
        assert found["rollout/occupancy"] == pytest.approx(sum(shares) / len(shares))
        assert found["rollout/tail"] == pytest.approx(sum(share < 0.5 for share in shares) / len(shares))


def test_the_end_token_is_no_part_of_a_bigram_and_a_stop_string_is_an_end():
    experience = Experience.from_lists([[5], [5], [5]], [[7, 8, 2], [7, 8, 9], [8, 9, 9]], 0, torch.device("cpu"))
    # The second ended at a stop string at its longest length, the third was cut.
    found = text_metrics(experience, [0.0, 0.0, 1.0], [True, True, False], [2], 3)
    assert found == {"distinct_2": pytest.approx(3 / 5), "truncated": pytest.approx(1 / 3), "length_r2": None}
