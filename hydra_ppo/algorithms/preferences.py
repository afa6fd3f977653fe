"""What a reward model minimises on preference pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ranking_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Bradley-Terry loss of preference pairs: -log sigmoid(r_chosen - r_rejected), one value per pair.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for one pair per prompt.

    Args:
        chosen_scores, rejected_scores: (B,).

    Returns:
        (B,).
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)
