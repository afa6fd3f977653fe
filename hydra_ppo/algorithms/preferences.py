"""What a reward model minimises on preference pairs.

Shapes: a score of each answer, (B,), or of each answer by each of k heads, (B, k); what is returned has the same shape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ranking_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Bradley-Terry loss of preference pairs: -log sigmoid(r_chosen - r_rejected), one value per pair.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for one pair per prompt.

    Args:
        chosen_scores, rejected_scores: (B,) or (B, k).

    Returns:
        The same shape.
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


def margin_loss(chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor) -> Tensor:
    """Bradley-Terry loss that asks for a distance: -log sigmoid(r_chosen - r_rejected - m).

    Source: Touvron et al. 2023 (arXiv 2307.09288), equation 2.

    Args:
        chosen_scores, rejected_scores: (B,) or (B, k).
        margins: (B,) how much better each pair's chosen answer is said to be.

    Returns:
        The shape of the scores.
    """
    apart = margins if chosen_scores.dim() == 1 else margins[:, None]
    return -F.logsigmoid(chosen_scores - rejected_scores - apart)


def divergent_loss(chosen_values: Tensor, rejected_values: Tensor, counts: Tensor) -> Tensor:
    """Bradley-Terry loss at every token from where two answers part to the end of the longer, averaged over those.

    Source: Yao et al. 2023 (arXiv 2308.01320), the reward model's loss in DeepSpeed-Chat's code.

    Args:
        chosen_values, rejected_values: (B, W, k) what the heads say after each token; that of an answer which has ended is to
            be what they said at its end.
        counts: (B, W) bool, the tokens that count, at least one per pair.

    Returns:
        (B, k).
    """
    each = -F.logsigmoid(chosen_values - rejected_values)  # (B, W, k)
    return each.masked_fill(~counts[..., None], 0.0).sum(dim=1) / counts.sum(dim=1, keepdim=True)


def advantage_loss(chosen_scores: Tensor, rejected_scores: Tensor, expected: Tensor, bound: float) -> Tensor:
    """Bradley-Terry loss with advantages a = r - e held within about +-bound.

    L = -log s(a_c - a_r) - log s(m - a_c) - log s(m + a_r), s the logistic function and m the bound. e(x) cancels in the first
    term. For one pair alone, with e between its scores, the optimum is a_c = -a_r = m / 3.

    Source: Peng et al. 2023 (arXiv 2309.10202), section 3.1. No gradient goes into e here: `expected_loss` trains it, which is
    this package's choice where the paper leaves it open.

    Args:
        chosen_scores, rejected_scores: (B,) or (B, k) r of both answers.
        expected: (B,) e, the expected reward of the prompt.
        bound: m, above 0.

    Returns:
        The shape of the scores.
    """
    e = expected.detach() if chosen_scores.dim() == 1 else expected.detach()[:, None]
    bounds = F.logsigmoid(bound - (chosen_scores - e)) + F.logsigmoid(bound + (rejected_scores - e))
    return ranking_loss(chosen_scores, rejected_scores) - bounds


def expected_loss(expected: Tensor, chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Squared distance of a prompt's expected reward from the mean of its two answers' rewards, which gets no gradient.

    Args:
        expected: (B,) e.
        chosen_scores, rejected_scores: (B,) or (B, k) r of both answers; of several heads their mean counts.

    Returns:
        (B,).
    """
    target = (chosen_scores + rejected_scores).detach() / 2
    return (expected - (target if target.dim() == 1 else target.mean(dim=1))) ** 2
