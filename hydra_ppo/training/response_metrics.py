"""What the responses of a rollout show by themselves: variety, length, what was cut, and how full their decoding was."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hydra_ppo.experience import Experience, split_by_length
from hydra_ppo.training.metrics import Metrics


def text_metrics(
    experience: Experience, scores: Sequence[float], ended: Sequence[bool], eos_ids: Sequence[int], most: int
) -> Metrics:
    """Return distinct_2, truncated and length_r2 of responses, without a prefix.

    Args:
        scores: of each response, before they are shaped.
        ended: of each response, whether it came to an end token or a stop string.
        eos_ids: tokens that end a response; distinct-2 leaves them out, since they end nearly all alike.
        most: `rollout.max_new_tokens`.
    """
    responses = [row[:-1] if row and row[-1] in eos_ids else row for row in experience.responses()]
    lengths = experience.response_lengths
    cut = sum(not done and length >= most for done, length in zip(ended, lengths, strict=True))
    return {
        "distinct_2": distinct_ngrams(responses, 2),
        "truncated": cut / len(lengths),
        "length_r2": length_r2(scores, lengths),
    }


def shape_metrics(
    experience: Experience,
    scores: Sequence[float],
    ended: Sequence[bool],
    eos_ids: Sequence[int],
    most: int,
    together: int | None,
) -> Metrics:
    """Return what the responses of a rollout show: rollout/distinct_2, rollout/truncated, reward/length_r2, and its decoding.

    Args:
        scores, ended, eos_ids, most: as of `text_metrics`.
        together: rows of a decode batch; None where somebody else samples, whose batches are not known.
    """
    found = text_metrics(experience, scores, ended, eos_ids, most)
    shown: Metrics = {f"rollout/{name}": found[name] for name in ("distinct_2", "truncated")}
    if together is not None:
        shown |= decoding_metrics(experience.prompt_lengths, experience.response_lengths, together)
    return shown | {"reward/length_r2": found["length_r2"]}


def distinct_ngrams(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Return the share of different ones among the n-grams of all responses together; None where there are none.

    Source: Li et al. 2016 (arXiv 1510.03055), distinct-1 and distinct-2; theirs is over all tokens, ours over all n-grams, so
    that 1 is the most. It falls with the number of responses: compare those of equally many.
    """
    grams = [tuple(row[i : i + n]) for row in responses for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def length_r2(scores: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Return R², the share of the scores' variance that a line over the logarithm of the length explains.

    The squared correlation of score and log length. None where there are fewer than three responses, or scores or lengths do
    not vary.
    """
    if len(scores) < 3 or len(set(lengths)) < 2 or len(set(scores)) < 2:
        return None
    logs = [math.log(max(length, 1)) for length in lengths]
    x_mean, y_mean = math.fsum(logs) / len(logs), math.fsum(scores) / len(scores)
    xx = math.fsum((x - x_mean) ** 2 for x in logs)
    yy = math.fsum((y - y_mean) ** 2 for y in scores)
    xy = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(logs, scores, strict=True))
    return min(xy * xy / (xx * yy), 1.0) if xx > 0 and yy > 0 else None


def decoding_metrics(prompt_lengths: Sequence[int], response_lengths: Sequence[int], together: int) -> Metrics:
    """Return how full decoding was, from lengths alone: no clock is read and no device waited for.

    A decode batch is a group of at most `together` rows, longest prompts first, as `rollout.sampling` makes them. It takes as
    many steps as its longest response has tokens; at step t (0, 1, ...) those rows are unfinished that have more than t
    tokens. Rows that have ended leave the batch, so a low share costs less than it would with padding; what it costs is the
    weights that are read for few rows.

    Args:
        prompt_lengths, response_lengths: tokens of each row.
        together: rows of a decode batch.

    Returns:
        rollout/occupancy: mean over all decode steps of the share of the batch's rows that are unfinished.
        rollout/tail: share of the decode steps at which under half of the rows are.
    """
    steps = thin = 0
    shares = []
    for group in split_by_length(prompt_lengths, together):
        lengths = sorted(response_lengths[row] for row in group)
        longest = lengths[-1]
        shares.append(sum(lengths) / len(group))  # the sum over steps of the share
        steps += longest
        # Under half are unfinished once the row in the middle, counted from the longest, has ended.
        thin += longest - lengths[-((len(group) + 1) // 2)]
    if not steps:
        return {"rollout/occupancy": None, "rollout/tail": None}
    return {"rollout/occupancy": math.fsum(shares) / steps, "rollout/tail": thin / steps}
