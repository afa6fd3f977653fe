"""Role views as models with a value head, without TRL: any class that is asked for by name will do."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from hydra_ppo.errors import RoleError
from hydra_ppo.patches.known_rows import KnownRows
from hydra_ppo.patches.scored_logits import ScoredLogits, entropy_from_logits, logprobs_from_logits, score_next
from hydra_ppo.patches.step_passes import DeferredValues, batched_forward_pass
from hydra_ppo.patches.value_head import TokenScores, actor_critic, frozen_reference
from hydra_ppo.patches.versions import HostError
from hydra_ppo.views.views import role_views
from tests.hosts import common

TOLERANCE = 1e-5
ROWS = [list(range(5, 15)), list(range(20, 27)), list(range(40, 49))]


class Parent(nn.Module):
    """Asked for by name; its constructor is TRL's business."""

    def __init__(self):
        raise AssertionError("the parent's constructor ran")


def batch(side="right", rows=ROWS):
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), common.PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        columns = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, columns], mask[row, columns] = torch.tensor(tokens), 1
    return ids, mask


@pytest.fixture
def model():
    return common.hydra_model()


@pytest.fixture
def known(model):
    rows = KnownRows(role_views(model).reference.passes)
    rows.start()
    yield rows
    rows.stop()
    assert role_views(model).reference.passes.observers == []


def next_logprobs(model, ids, mask):
    with torch.no_grad():
        logits = role_views(model).reference(ids, mask).logits
        return logits[:, :-1].token_logprobs(ids[:, 1:]).logprobs * mask[:, 1:] * mask[:, :-1]


def test_models_are_children_of_the_parent_and_views(model, known):
    policy, reference = actor_critic(known, Parent), frozen_reference(known, Parent)
    assert isinstance(policy, Parent)
    assert type(policy) is type(actor_critic(known, Parent))
    trained = {id(p) for role in ("actor", "critic") for p in model.role_parameters(role).values()}
    assert {id(p) for p in policy.parameters()} == trained
    assert not list(reference.parameters())
    for view in (policy, reference, TokenScores(known.passes)):
        with pytest.raises(RoleError, match="deepcopy"):
            deepcopy(view)
        with pytest.raises(RoleError, match="round"):
            view.to(torch.bfloat16)
    with pytest.raises(HostError, match="generate"):
        policy(*batch()[:1], past_key_values=())
    with pytest.raises(HostError, match="upload the base"):
        policy.push_to_hub("name")


def test_values_scores_and_logits_are_those_of_the_roles(model, known):
    ids, mask = batch("left")
    views = role_views(model)
    logits, loss, values = actor_critic(known, Parent)(ids, attention_mask=mask, return_dict=True)
    assert loss is None
    torch.testing.assert_close(logits.hidden, views.actor(ids, mask).logits.hidden)
    torch.testing.assert_close(values, views.critic.score(views.critic.backbone(ids, mask).last_hidden_state)[..., 0])
    scores = TokenScores(known.passes)(ids, attention_mask=mask)[-1]
    torch.testing.assert_close(scores[:, -1], views.reward(ids, mask).logits[:, 0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_autocast_of_the_host_is_kept_out_where_asked(model, known, side):
    ids, mask = batch(side)
    with torch.no_grad():
        exact = actor_critic(known, Parent)(ids, attention_mask=mask)[2]
        scores = TokenScores(known.passes)(ids, mask)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            known.passes.forget()
            assert not torch.equal(actor_critic(known, Parent)(ids, attention_mask=mask)[2][mask.bool()], exact[mask.bool()])
            outside = actor_critic(known, Parent, autocast=False)(ids, attention_mask=mask)[2]
            assert torch.equal(outside[mask.bool()], exact[mask.bool()])
            assert torch.equal(TokenScores(known.passes, autocast=False)(ids, mask)[-1][mask.bool()], scores[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_the_reward_are_known_to_the_reference(model, known, side):
    ids, mask = batch(side)
    expected = next_logprobs(model, ids, mask)
    assert known.find(ids, mask) is None
    known.passes.forget()
    for row in range(len(ids)):  # some at a time, with padding of their own
        tokens = torch.tensor([ROWS[row]])
        positions = None if side == "right" else torch.arange(10 - len(ROWS[row]), 10)[None]
        role_views(model).reward(tokens, torch.ones_like(tokens), positions)
    assert known.kept == len(ids)
    torch.testing.assert_close(known.find(ids, mask), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert known.used == len(ids)
    known.end_step()
    assert known.find(ids, mask) is None


def test_rows_at_other_positions_or_with_other_tokens_are_not_known(model, known):
    ids, mask = batch("right")
    role_views(model).reward(ids, mask)
    moved_ids, moved_mask = batch("left")
    assert known.find(moved_ids, moved_mask) is None
    assert known.find(ids[:1] + 1, mask[:1]) is None
    gap = mask.clone()
    gap[0, 3] = 0
    assert known.find(ids, gap) is None
    assert known.find(ids, mask) is not None


def test_rows_that_nobody_asks_for_are_kept_for_one_step_only(model, known):
    for _ in range(2):
        role_views(model).reward(*batch())
        known.end_step()
    assert known.kept == len(ROWS)


def test_a_row_without_tokens_breaks_nothing(model, known):
    ids, mask = batch(rows=[ROWS[0], []])
    role_views(model).reward(ids, mask)
    assert known.find(ids[:1], mask[:1]) is not None
    assert known.find(ids, mask) is None


def test_entropies_stay_with_the_logits_they_belong_to(model):
    ids, mask = batch()
    logits = role_views(model).actor(ids, mask).logits
    columns = mask[:, 1:].bool()
    scored = score_next(logits, ids, columns)
    other = score_next(role_views(model).reference(ids, mask).logits, ids, columns)  # of the same shape, taken later
    entropy, lookup = entropy_from_logits(print), logprobs_from_logits(print)
    expected = logits[:, :-1].detach().entropy() * columns
    torch.testing.assert_close(entropy(torch.cat([scored])[:, :-1]), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(entropy(other[:, :-1]), expected)
    torch.testing.assert_close(entropy(logits[:, :-1]) * columns, expected, rtol=TOLERANCE, atol=TOLERANCE)
    found = lookup(scored[:, :-1, :], ids[:, 1:])
    expected = logits[:, :-1].token_logprobs(ids[:, 1:]).logprobs * columns
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    both = torch.cat([scored, other])
    assert both.entropy.shape == (6, 10)
    assert both[:, :-1].logits.shape == (6, 9, common.VOCABULARY)
    without = ScoredLogits(scored.logprobs, scored.entropy, None)
    with pytest.raises(HostError, match="not at hand"):
        without.softmax(-1)


def test_the_critic_waits_for_the_actors_backward_pass(model, known):
    """What TRL's method does with the model, by hand."""

    class Trainer:
        class accelerator:
            unwrap_model = staticmethod(lambda model: model)
            autocast = staticmethod(lambda: torch.autocast("cpu", enabled=False))

        @batched_forward_pass
        def forward(self, model, queries, responses, inputs, return_logits, response_masks):
            model.eval()
            logits, _, values = model(**inputs)
            return logits[:, :-1, :].logprobs, logits[:, :-1], values[:, :-1], inputs["attention_mask"][:, 1:]

    ids, mask = batch()
    queries, responses = [torch.tensor(row[:3]) for row in ROWS], [torch.tensor(row[3:]) for row in ROWS]
    policy = actor_critic(known, Parent)
    arguments = (policy, queries, responses, {"input_ids": ids, "attention_mask": mask})
    logprobs, _, values, _ = Trainer().forward(*arguments, return_logits=True)
    assert isinstance(values, DeferredValues)
    with torch.no_grad():
        now = Trainer().forward(*arguments)
    torch.testing.assert_close(now[0], logprobs.detach())
    torch.testing.assert_close(values - torch.zeros(()), now[2])
    assert (logprobs[:, :2] == 0).all()  # prompts are not looked up
