"""What the reward head says of given responses, read where PPO reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hydra_ppo.errors import NonFiniteError
from hydra_ppo.experience import Experience, Sequences
from hydra_ppo.model.answer_states import ends_and_means
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import ending_alike
from hydra_ppo.runtime.interruption import check_stop


@torch.no_grad()
def reward_scores(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    *,
    pad_id: int,
    rows: int = 16,
) -> list[float]:
    """Return the score of each response, in the order given.

    Args:
        prompts, responses: token ids; where a response ends in any of `eos_ids`, it is scored as if it ended in the first.
        eos_ids: tokens that end a response, the trained one first.
        pad_id: fills up rows; changes no score.
        rows: most rows of one pass.

    Raises:
        RoleError: where the model has no reward role.
        NonFiniteError: where a score is NaN or infinite.

    Memory: the final hidden states of one pass, (rows, T, H).
    """
    if not prompts:
        return []
    scores = torch.zeros(len(prompts), device=model.device)
    for group, sequences in _groups(model, prompts, responses, eos_ids, pad_id, rows):
        scores[torch.tensor(group, device=model.device)] = model.scores(sequences)
    found: list[float] = scores.tolist()
    for row, value in enumerate(found):
        if not math.isfinite(value):
            raise NonFiniteError(f"score of response {row} is {value}; use a wider model.dtype, or an earlier checkpoint.")
    return found


@torch.no_grad()
def answer_states(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    *,
    pad_id: int,
    rows: int = 16,
    means: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (N, H) fp32 the reward role's states that `reward_scores` reads, on the host; where asked, means over answers.

    Args:
        prompts, responses, eos_ids, pad_id, rows: as of `reward_scores`.
        means: whether to return (N, H) means over the tokens of each response too.

    Raises:
        RoleError: where the model has no reward role.

    Memory: the final hidden states of one pass, (rows, T, H); what is returned.
    """
    found = [torch.zeros(len(prompts), model.architecture.hidden_size) for _ in range(1 + means)]
    for group, sequences in _groups(model, prompts, responses, eos_ids, pad_id, rows):
        for kept, part in zip(found, ends_and_means(model, sequences, means), strict=False):
            if part is not None:
                kept[group] = part.cpu()
    return found[0], found[1] if means else None


@torch.no_grad()
def scores_and_means(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    *,
    pad_id: int,
    rows: int = 16,
) -> tuple[Tensor, Tensor]:
    """Return scores (N,) and the mean final hidden state over each response's tokens (N, H), fp32 on the CPU, from one pass.

    Arguments as of `reward_scores`.
    """
    scores = torch.zeros(len(prompts))
    means = torch.zeros(len(prompts), model.architecture.hidden_size)
    for group, sequences in _groups(model, prompts, responses, eos_ids, pad_id, rows):
        found, mean = model.scores_and_means(sequences)
        scores[group], means[group] = found.cpu(), mean.cpu()
    return scores, means


def _groups(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    pad_id: int,
    rows: int,
) -> Iterator[tuple[list[int], Sequences]]:
    """Yield row numbers and sequences of each pass, in the reward role; arguments as of `reward_scores`."""
    was_training = model.training
    model.eval()
    experience = Experience.from_lists(prompts, responses, pad_id, model.device)
    try:
        with model.role("reward"):
            for group in experience.split(rows):
                check_stop()
                yield group, ending_alike(experience.select(group).sequences(), eos_ids)
    finally:
        model.train(was_training)
