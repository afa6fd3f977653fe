"""Every way host code gets from logits to numbers: equal to real logits, gradients too, without a (B, T, V) tensor."""

import pytest
import torch
import torch.nn.functional as F

from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.errors import HydraError
from hydra_ppo.views import lazy_logits
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.sampled_logits import SampledLogits
from tests.allocations import LargestAllocation

TOLERANCE = 2e-5
B, T, H, V = 4, 7, 8, 301


def pair(softcap=None, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, H)
    head = LMHead(torch.randn(V, H) * 0.5, torch.randn(V) if bias else None, softcap)
    lazy = LazyLogits(hidden.clone().requires_grad_(), head)
    other = hidden.clone().requires_grad_()
    real = F.linear(other, head.weight, head.bias)
    if softcap is not None:
        real = softcap * torch.tanh(real / softcap)
    return lazy, lazy.hidden, real, other


TOKENS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def temperature_then_gather(logits):
    logits = logits[:, 1:-1]
    logits /= 0.7
    return torch.gather(F.log_softmax(logits, dim=-1), 2, TOKENS[:, 2:].unsqueeze(2)).squeeze(2)


def row_by_row(logits):
    """The way of TRL's selective_log_softmax."""
    chosen = torch.gather(logits, dim=-1, index=TOKENS.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def method_chain(logits):
    return logits.float().log_softmax(-1).gather(-1, TOKENS[..., None]).squeeze(-1)


def cross_entropy(logits):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), TOKENS[:, 1:].reshape(-1), reduction="none")


def mean_cross_entropy(logits):
    labels = TOKENS.clone()
    labels[0] = -100
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def nll(logits):
    return F.nll_loss(torch.log_softmax(logits.flatten(0, 1), -1), TOKENS.flatten(), reduction="sum")


def entropy_of_trl(logits):
    probs = F.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def by_other_names(logits):
    probs = torch.softmax(input=logits, dim=-1)
    entropy = torch.logsumexp(logits, axis=-1) - torch.sum(probs * logits, axis=-1)
    logp = torch.gather(input=torch.log_softmax(input=logits, dim=-1), dim=-1, index=TOKENS[..., None])
    return entropy + logp[..., 0]


def entropy_of_logprobs(logits):
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(-1)


def of_one_mask(logits):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2:] = False
    return F.log_softmax(logits[mask], -1).gather(-1, TOKENS[mask][:, None])


def concatenated(logits):
    again = torch.cat([logits[:1], logits[1:]])
    return torch.log_softmax(again, dim=-1).gather(-1, TOKENS[..., None])


def probability(logits):
    return torch.softmax(logits * 0.5, -1).gather(-1, TOKENS[..., None])


WAYS = [
    temperature_then_gather,
    row_by_row,
    method_chain,
    cross_entropy,
    mean_cross_entropy,
    nll,
    entropy_of_trl,
    by_other_names,
    entropy_of_logprobs,
    of_one_mask,
    concatenated,
    probability,
]


@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (4.0, True)])
@pytest.mark.parametrize("way", WAYS)
def test_equals_real_logits_with_gradients_and_without_their_memory(way, softcap, bias, monkeypatch):
    monkeypatch.setitem(lazy_logits.token_logprobs.__globals__["CHUNK_BYTES"], "cpu", 4 * V * 2)  # two rows a chunk
    lazy, hidden, real, other = pair(softcap, bias)
    with LargestAllocation() as largest:
        found = way(lazy)
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        (found * weights).sum().backward()
    expected = way(real)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(hidden.grad, other.grad, rtol=TOLERANCE, atol=TOLERANCE)
    assert largest.elements <= H * V  # the head itself; all logits would be B * T * V, more than three times that


@pytest.mark.parametrize("way", [entropy_of_trl, entropy_of_logprobs])
def test_entropy_is_free_once_log_probs_were_taken(way, monkeypatch):
    lazy, _, real, _ = pair()
    lazy.token_logprobs(TOKENS)
    monkeypatch.setattr(lazy_logits, "token_logprobs", None)  # a second pass over the vocabulary would raise
    with torch.no_grad():
        torch.testing.assert_close(way(lazy), way(real.detach()), rtol=TOLERANCE, atol=TOLERANCE)


OTHERS = {
    "argmax": lambda x: x.argmax(-1).float(),
    "topk": lambda x: torch.topk(x, 3, dim=-1).values,
    "indexing the vocabulary": lambda x: x[..., 7],
    "subtraction": lambda x: x - x.mean(),
    "multiplication": lambda x: torch.softmax(x, -1) * torch.ones(V),
    "gather of several tokens": lambda x: x.gather(-1, TOKENS[..., None].expand(B, T, 2)),
    "kl_div": lambda x: F.kl_div(F.log_softmax(x, -1), torch.full((B, T, V), 1 / V), reduction="sum"),
    "comparison": lambda x: (x == x.amax(-1, keepdim=True)).float(),
    "reshape across the vocabulary": lambda x: x.reshape(-1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_operation_gets_real_logits_and_one_warning(name, caplog, monkeypatch):
    monkeypatch.setattr(lazy_logits, "_warned", set())
    lazy, hidden, real, other = pair()
    for _ in range(2):
        found = OTHERS[name](lazy)
    torch.testing.assert_close(found, OTHERS[name](real), rtol=TOLERANCE, atol=TOLERANCE)
    if found.requires_grad:
        found.square().sum().backward()
        OTHERS[name](real).square().sum().backward()
        torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert [r.message for r in caplog.records].count(
        f"logits of {[B, T, V]} are computed in full for {name}: it takes their memory"
    ) == 1


def test_tells_what_a_tensor_tells():
    lazy = pair()[0]
    assert (lazy.shape, lazy.size(-1), lazy.dim(), len(lazy), lazy.dtype) == ((B, T, V), V, 3, B, torch.float32)
    assert lazy.requires_grad
    assert not lazy.detach().requires_grad
    assert lazy.to(torch.bfloat16) is lazy
    assert lazy.device.type == "cpu"
    with pytest.raises(AttributeError):
        lazy.no_such_thing  # noqa: B018


def test_logits_of_a_rollout_are_sliced_as_real_ones():
    sampled = SampledLogits(TOKENS, torch.randn(B, T), V)
    for index in (slice(1, 3), 2, (slice(None), slice(None, -1)), (slice(None), slice(None, -1), slice(None))):
        found = sampled[index]
        parts = index[:2] if isinstance(index, tuple) else index
        assert found.shape == torch.empty(B, T, V)[index].shape
        assert torch.equal(found.gather(-1, TOKENS[parts][..., None])[..., 0], sampled.logprobs[parts])
    assert [row.shape for row in sampled] == [(T, V)] * B
    for index in ((0, 0, 0), (slice(None), slice(None), 3), (slice(None), slice(None), slice(1, None))):
        with pytest.raises(HydraError, match="indexing the vocabulary"):
            sampled[index]
