"""What a reward model loses on the preference pairs of one pass, whichever loss is set and however many heads there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_ppo.algorithms.ensembles import spread
from hydra_ppo.algorithms.preferences import advantage_loss, divergent_loss, expected_loss, margin_loss, ranking_loss
from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.heads import Readings
from hydra_ppo.training.pairs import TrainingPair


class PairLosses(NamedTuple):
    """What B pairs cost, and how they were scored.

    Attributes:
        ranking: (B,) the loss of the ranking, averaged over the heads that learn from the pair.
        margins: (B,) mean score of the chosen answer above that of the rejected one.
        spread: (B,) standard deviation over the heads, mean of both answers; 0 of one head.
        expected: (B,) the loss of the expected reward; None where there is no head for it.
    """

    ranking: Tensor
    margins: Tensor
    spread: Tensor
    expected: Tensor | None = None


class Columns(NamedTuple):
    """The tokens at which a loss along the answers is taken.

    Attributes:
        read: (2B, W) columns of the chosen sequences, then of the rejected ones; of one that has ended, its last.
        counts: (B, W) bool.
    """

    read: Tensor
    counts: Tensor


def along_columns(rows: Sequence[PreferenceRow], device: torch.device) -> Columns:
    """Find the columns from where the two sequences of each pair part to the end of the longer.

    Sequences that are equal count at their last token. The value of one that has ended stays what it was there, so that nothing
    is read at padding: DeepSpeed-Chat's code reads it there, which a packed pass does not have.

    Args:
        rows: B pairs.
        device: of the result.
    """
    spans = []
    for row in rows:
        chosen, rejected = (*row.prompt_ids, *row.chosen_ids), (*row.before_rejected, *row.rejected_ids)
        end = max(len(chosen), len(rejected))
        shorter = min(len(chosen), len(rejected))
        parts = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        spans.append((min(parts, end - 1), end, len(chosen) - 1, len(rejected) - 1))
    starts, ends, chosen_last, rejected_last = torch.tensor(spans, device=device).unbind(dim=1)
    columns = starts[:, None] + torch.arange(max(end - start for start, end, _, _ in spans), device=device)  # (B, W)
    read = torch.cat([columns.minimum(last[:, None]) for last in (chosen_last, rejected_last)])
    return Columns(read, columns < ends[:, None])


def pair_losses(config: SFTConfig, rows: Sequence[PreferenceRow], found: Readings, columns: Columns | None) -> PairLosses:
    """Return what the pairs of a pass cost.

    Args:
        config: the loss.
        rows: B pairs.
        found: what the heads say of the B chosen answers, then of the B rejected ones.
        columns: those that `found.along` was read at.

    Memory: nothing that grows with the tokens but for `divergent`, a few (B, W, k).
    """
    count = len(rows)
    chosen, rejected = found.members[:count], found.members[count:]  # (B, k) each
    expected = None
    if config.reward_loss == "divergent":
        assert found.along is not None
        assert columns is not None
        each = divergent_loss(found.along[:count], found.along[count:], columns.counts)
    elif config.reward_loss == "margin":
        each = margin_loss(chosen, rejected, torch.tensor([_margin(row) for row in rows], device=chosen.device))
    elif config.reward_loss == "advantage":
        assert found.expected is not None
        each, expected = _of_advantages(config.advantage_bound, rows, chosen, rejected, found.expected[:count])
    else:
        each = ranking_loss(chosen, rejected)
    apart = spread(found.members.detach())
    margins = chosen.detach().mean(dim=1) - rejected.detach().mean(dim=1)
    return PairLosses(_over_heads(each, rows), margins, (apart[:count] + apart[count:]) / 2, expected)


def _of_advantages(
    bound: float, rows: Sequence[PreferenceRow], chosen: Tensor, rejected: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss of each head (B, k) and that of the expected reward (B,).

    Where conversations part before their last turn the two answers are to two prompts, each with one answer whose mean says
    nothing: such pairs are ranked, and neither bounded nor taken as an expectation.
    """
    alone = torch.tensor([row.rejected_prompt_ids is not None for row in rows], device=chosen.device)
    each = torch.where(alone[:, None], ranking_loss(chosen, rejected), advantage_loss(chosen, rejected, expected, bound))
    return each, expected_loss(expected, chosen, rejected).masked_fill(alone, 0.0)


def _over_heads(each: Tensor, rows: Sequence[PreferenceRow]) -> Tensor:
    """Average a loss (B, k) over the heads that learn from each pair."""
    count = each.shape[1]
    if count == 1:
        return each[:, 0]
    seen = [row.heads if isinstance(row, TrainingPair) and row.heads is not None else (True,) * count for row in rows]
    learns = torch.tensor(seen, device=each.device)
    return each.masked_fill(~learns, 0.0).sum(dim=1) / learns.sum(dim=1)


def _margin(row: PreferenceRow) -> float:
    if row.margin is None:
        raise ConfigError("reward_loss='margin' needs the margin of each pair; load the rows with margins=True.")
    return row.margin
