"""Role views against four separate Hugging Face models: numbers, gradients, ownership, and what hosts do to models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from hydra_ppo.errors import RoleError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import quantize_linears
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.views import role_views
from tests.families import FAMILIES, randomise
from tests.hosts.common import separate_models

TOLERANCE = 2e-5
PAD = 0


def build(family: str = "llama", quantization: str | None = None) -> HydraModel:
    torch.manual_seed(0)
    base = HydraModel.from_config(FAMILIES[family], train="base").causal_lm.requires_grad_(False)
    if quantization:
        quantize_linears(base, quantization, torch.float32)
    model = HydraModel(base)
    randomise(model)
    return model


def batch(width: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with padding on the left, on the right, on both sides and none."""
    ids = torch.randint(3, 90, (4, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, -3:] = mask[2, :2] = mask[2, -1:] = 0
    return ids.masked_fill(mask == 0, PAD), mask, mask.cumsum(1) - mask


def near(found, expected, mask=None):
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


# -- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions_given", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox", "opt", "mistral", "phi3"])
def test_equals_separate_models(family, positions_given):
    model = build(family)
    separate, views = separate_models(model), role_views(model)
    ids, mask, positions = batch()
    options = {"attention_mask": mask}
    if positions_given and family != "opt":  # OPT counts tokens by itself
        options["position_ids"] = positions
    with torch.no_grad():
        for role in ("actor", "reference"):
            logits = views[role](ids, **options).logits
            assert isinstance(logits, LazyLogits)
            near(logits.materialize(), separate[role].eval()(ids, **options).logits, mask)
        for role in ("critic", "reward"):
            theirs = separate[role].eval()
            backbone = getattr(theirs, theirs.base_model_prefix)
            ours = views[role]
            hidden = getattr(ours, ours.base_model_prefix)(ids, **options, output_hidden_states=True).hidden_states[-1]
            near(ours.score(hidden), theirs.score(backbone(ids, **options).last_hidden_state), mask)


def test_classifier_reads_the_last_token_of_each_row():
    model = build()
    ids, mask, positions = batch()
    role_views(model).reward.config.pad_token_id = PAD
    separate = separate_models(model)["reward"].eval()
    with torch.no_grad():
        expected = separate(ids, attention_mask=mask, position_ids=positions).logits
        near(role_views(model).reward(ids, attention_mask=mask, position_ids=positions).logits, expected)
        whole = torch.where(mask.bool(), ids, ids.max())  # no mask: every token counts
        near(role_views(model).reward(whole).logits, separate(whole).logits)
        # The pad token at the end of a row may be padding, or the end of an answer: nobody guesses.
        with pytest.raises(RoleError, match=r"attention_mask=None: rows end in 0, the pad token, .*; pass the mask"):
            role_views(model).reward(ids[[1, 3]])


def test_padding_between_tokens_is_masked_as_it_always_was():
    model = build()
    separate = separate_models(model)["actor"].eval()
    ids, mask, _ = batch()
    mask[3, 5] = 0
    with torch.no_grad():
        near(role_views(model).actor(ids, mask).logits.materialize(), separate(ids, attention_mask=mask).logits, mask)


def test_labels_give_the_loss_of_next_tokens():
    model = build()
    ids, mask, _ = batch()
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)  # what stands before a row's first token predicts nothing
    labels = labels.masked_fill(mask == 0, -100)
    expected = separate_models(model)["actor"].eval()(ids, attention_mask=mask, labels=labels).loss
    near(role_views(model).actor(ids, attention_mask=mask, labels=labels).loss, expected)


def test_generate_is_that_of_transformers():
    model = build()
    ids, mask, _ = batch()
    options = {"attention_mask": mask[:1], "max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    for role in ("actor", "reference"):
        expected = separate_models(model)[role].eval().generate(ids[:1], **options)
        assert torch.equal(role_views(model)[role].generate(ids[:1], **options), expected)
    config = GenerationConfig(max_new_tokens=4, do_sample=True, pad_token_id=PAD)
    out = role_views(model).actor.generate(
        ids[:1], attention_mask=mask[:1], generation_config=config, output_scores=True, return_dict_in_generate=True
    )
    assert 1 <= len(out.scores) <= 4


def test_disable_adapter_gives_the_reference():
    views = role_views(build())
    ids, mask, _ = batch()
    with torch.no_grad():
        with views.actor.disable_adapter():
            inside = views.actor(ids, mask).logits.materialize()
        assert torch.equal(inside, views.reference(ids, mask).logits.materialize())
        assert not torch.equal(inside, views.actor(ids, mask).logits.materialize())


# -- gradients -----------------------------------------------------------------------------------------------------------


def losses(actor, critic, ids, mask, positions):
    """The sum that TRL's wrapper makes: both forward passes first, one backward."""
    options = {"attention_mask": mask, "position_ids": positions}
    hidden = getattr(critic, critic.base_model_prefix)(ids, **options, output_hidden_states=True).hidden_states[-1]
    values = critic.score(hidden)[:, :-1, 0]
    logp = torch.log_softmax(actor(ids, **options).logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    counts = mask[:, 1:] * mask[:, :-1]
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2)) * counts
    return (logp * weights).sum() + (values.square() * counts).sum()


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_for_both_roles_gives_exact_gradients(checkpointing, quantization):
    ids, mask, positions = batch()
    together, apart = build(quantization=quantization), build(quantization=quantization)
    together.enable_checkpointing(checkpointing)
    views = role_views(together)
    losses(views.actor, views.critic, ids, mask, positions).backward()
    # The same sum by hand, each role in a backward of its own, nothing checkpointed.
    counts = (mask[:, 1:] * mask[:, :-1]).bool()
    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    weights = torch.randn((4, ids.shape[1] - 1), generator=torch.Generator().manual_seed(2))
    for row, tokens in enumerate(rows):
        with apart.role("actor"):
            hidden = apart.hidden_states(tokens[None])
            logp = torch.log_softmax(hidden[0, :-1] @ apart.architecture.lm_head().weight.T, -1)
            (logp.gather(-1, tokens[1:, None])[:, 0] * weights[row][counts[row]]).sum().backward()
        with apart.role("critic"):
            apart.heads["value"](apart.hidden_states(tokens[None]))[0, :-1, 0].square().sum().backward()
    for role in ("actor", "critic"):
        ours, theirs = together.role_parameters(role), apart.role_parameters(role)
        for name, parameter in theirs.items():
            scale = parameter.grad.abs().max().clamp(min=1e-6)
            assert (ours[name].grad - parameter.grad).abs().max() <= TOLERANCE * 5 * scale, name


def test_reference_and_reward_never_get_a_graph():
    views = role_views(build())
    ids, mask, _ = batch()
    assert not views.reference(ids, mask).logits.requires_grad
    assert not views.reward(ids, mask).logits.requires_grad


# -- one pass for reference and reward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("reference", "reward"), ("reward", "reference")])
def test_reference_and_reward_share_one_pass(order):
    views = role_views(build())
    ids, mask, positions = batch()
    alone = {role: views[role](ids, mask, positions).logits for role in order for _ in [views.actor.passes.forget()]}
    views.actor.passes.forget()
    calls = []
    views.actor.hydra.architecture.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = views[order[0]](ids, mask, positions).logits
        views.critic(ids, mask, positions)  # TRL's order: the critic in between
        second = views[order[1]](ids, mask, positions).logits
    assert len(calls) == 2
    assert views.actor.passes.reused == 1
    for role, logits in zip(order, (first, second), strict=True):
        real = [x.materialize() if isinstance(x, LazyLogits) else x for x in (logits, alone[role])]
        assert torch.equal(real[0], real[1])


def test_a_reward_on_truncated_responses_uses_the_reference_pass_on_whole_ones():
    views = role_views(build())
    ids, mask, _ = batch()
    shorter = mask.clone()
    shorter[3, 6:] = shorter[0, 8:] = 0
    with torch.no_grad():
        expected = views.reward(ids, shorter).logits
        views.actor.passes.forget()
        views.reference(ids, mask)
        assert torch.equal(views.reward(ids, shorter).logits, expected)
    assert views.actor.passes.reused == 1


@pytest.mark.parametrize("change", ["token", "longer", "fewer rows"])
def test_other_tokens_get_a_pass_of_their_own(change):
    views = role_views(build())
    ids, mask, _ = batch()
    other, longer = ids.clone(), mask.clone()
    if change == "token":
        other[3, 0] += 1
    if change == "longer":
        longer[1] = 1
    rows = slice(0, 3) if change == "fewer rows" else slice(None)
    with torch.no_grad():
        expected = views.reward(other[rows], longer[rows]).logits
        views.actor.passes.forget()
        views.reference(ids, mask)
        assert torch.equal(views.reward(other[rows], longer[rows]).logits, expected)
    assert views.actor.passes.reused == 0


def test_training_and_sampling_let_go_of_the_frozen_pass():
    views = role_views(build())
    passes = views.actor.passes
    ids, mask, _ = batch()
    for act in (lambda: views.actor(ids, mask), lambda: views.actor.generate(ids, attention_mask=mask, max_new_tokens=1)):
        views.reference(ids, mask)
        assert passes._frozen is not None
        act()
        assert passes._frozen is None


# -- ownership -----------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As TRL puts policy and value model together."""

    def __init__(self, views) -> None:
        super().__init__()
        self.policy, self.value_model = views.actor, views.critic
        self.critic_backbone = getattr(views.critic, views.critic.base_model_prefix)


def test_parameters_are_the_roles_own_once():
    model = build()
    views = role_views(model)
    for role in ("actor", "critic"):
        own = {id(p) for p in model.role_parameters(role).values()}
        listed = list(views[role].parameters())
        assert {id(p) for p in listed} == own
        assert len(listed) == len(own)
        assert len(views[role].state_dict()) == len(own)
        assert all(p.requires_grad for p in listed)
    for role in ("reference", "reward"):
        assert list(views[role].parameters()) == []
        assert list(views[role].buffers()) == []
        assert views[role].state_dict() == {}
    both = {id(p) for role in ("actor", "critic") for p in model.role_parameters(role).values()}
    assert sorted(map(id, Wrapper(views).parameters())) == sorted(both)
    assert role_views(model) is views
    assert not [name for name, _ in model.named_modules() if "views" in name]


def test_state_dict_of_a_view_loads_into_another_model():
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.role_parameters("actor").values():
            parameter.zero_()
    role_views(other).actor.load_state_dict(role_views(model).actor.state_dict())
    for name, parameter in other.role_parameters("actor").items():
        assert torch.equal(parameter, model.role_parameters("actor")[name])


def test_moving_a_wrapper_moves_the_base_once(monkeypatch):
    model = build()
    moves = []
    monkeypatch.setattr(model, "_apply", lambda fn, recurse=True: moves.append(fn))
    wrapper = Wrapper(role_views(model))
    wrapper.to("cpu")
    wrapper.to(torch.float32)
    assert moves == []  # it is there already
    role_views(model).actor.to("meta")
    assert len(moves) == 1
    for cast in (lambda: wrapper.half(), lambda: role_views(model).actor.to(torch.bfloat16)):
        with pytest.raises(RoleError, match="would round the fp32 adapters"):
            cast()


def test_accelerate_prepares_views_and_finds_them_again():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = build()
    wrapper = Wrapper(role_views(model))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-3)
    prepared, optimizer = accelerator.prepare(wrapper, optimizer)
    assert accelerator.unwrap_model(prepared).policy is role_views(model).actor
    reference = accelerator.prepare(role_views(model).reference)
    ids, mask, positions = batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    accelerator.backward(losses(prepared.policy, prepared.value_model, ids, mask, positions))
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".actor." in n or ".critic." in n or n == "heads.value.weight" for n in changed)
    assert not reference(ids, mask).logits.requires_grad


@pytest.mark.parametrize("role", ["actor", "critic", "reward"])
def test_copies_are_refused(role):
    view = role_views(build())[role]
    with pytest.raises(RoleError, match="would copy the base"):
        copy.deepcopy(view)
    with pytest.raises(RoleError, match="save_pretrained"):
        torch.save(view, io.BytesIO())


def test_saving_any_view_writes_adapters_and_heads(tmp_path):
    model = build()
    role_views(model).critic.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"actor", "critic", "heads.safetensors", "hydra.json"}
    assert sum(p.stat().st_size for p in tmp_path.rglob("*")) < 4 * sum(
        p.numel() * 4 for p in role_views(model).actor.parameters()
    )


def test_checkpointing_is_switched_by_any_view():
    model = build()
    views = role_views(model)
    views.actor.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.checkpointing
    assert views.critic.is_gradient_checkpointing
    views.critic.gradient_checkpointing_disable()
    assert not model.checkpointing
    with pytest.raises(RoleError, match="use_reentrant=True"):
        views.actor.gradient_checkpointing_enable({"use_reentrant": True})


# -- what a view does not do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": True}, "use_cache"),
        ({"past_key_values": ()}, "past_key_values"),
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, "inputs_embeds"),
        ({"output_attentions": True}, "output_attentions"),
        ({"input_ids": None}, "input_ids=None"),
    ],
)
def test_what_is_not_supported_is_refused(options, message):
    ids, mask, _ = batch()
    with pytest.raises(RoleError, match=message):
        role_views(build()).actor(**{"input_ids": ids, "attention_mask": mask} | options)


def test_only_the_last_hidden_state_is_kept():
    views = role_views(build())
    ids, mask, _ = batch()
    states = views.actor(ids, mask, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert torch.equal(states[-1], states[3])
    with pytest.raises(RoleError, match="only the last one"):
        states[0]
    assert views.actor(ids, mask).hidden_states is None
    logits, _ = views.actor(ids, mask, output_hidden_states=True, return_dict=False)
    assert isinstance(logits, LazyLogits)


def test_a_bounded_critic_is_no_classifier():
    from tests.training import hydra

    model = hydra()
    model.bound_values([-1.0, 1.0])
    with pytest.raises(RoleError, match=r"value_range=\[-1.0, 1.0\] bounds the critic's values"):
        role_views(model)
    model.bound_values(None)
    assert len(role_views(model)) == 4


def test_views_need_the_stage_that_has_their_roles():
    with pytest.raises(RoleError, match="needs the role 'actor', which does not exist at stage 'sft'"):
        role_views(HydraModel.from_config(FAMILIES["llama"], train="sft"))
