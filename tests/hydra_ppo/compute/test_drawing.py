"""Tokens that are never drawn, together with settings that keep few."""

from __future__ import annotations

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hydra_ppo.compute.drawing import draw


def test_what_is_never_drawn_takes_no_place_among_the_kept():
    """The two likeliest of five tokens are never drawn: top-k 1 and top-p 0.5 then keep the third, not one of these."""
    logits = torch.tensor([[3.0, 5.0, 4.0, 1.0, 0.0]])
    never = torch.tensor([1, 2])
    expected = torch.log_softmax(logits, dim=-1)[0, 0]
    for warper in (TopKLogitsWarper(1), TopPLogitsWarper(0.5)):
        for share in (0.0, 0.5, 0.999):
            drawn = draw(logits.clone(), torch.tensor([share]).double(), lambda scores: warper(None, scores), never)  # noqa: B023
            assert drawn.tokens.tolist() == [0]
            torch.testing.assert_close(drawn.logprobs[0], expected)  # of the whole distribution all the same
