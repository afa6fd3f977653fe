"""token_logprobs against autograd on the full logits, and its memory bound."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hydra_ppo.compute import lm_head
from hydra_ppo.compute import logprobs as module
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.runtime.memory import LiveBytes
from tests.allocations import LargestAllocation

TOLERANCE = 1e-5
HALF_PRECISION = 2e-2
"""Of log-probs and entropies in nats, and of gradients relative to their norm: bf16 rounds to 2^-9, and logits are near 10."""
ROUNDING = 2e-6
"""Nats, of numbers up to 32, which fp32 rounds to multiples of 1.9e-6."""
N, H, V = 37, 16, 101
CHUNK = 4 * V * 5
NARROW = 16
"""With `CHUNK`, six groups of at most seven rows and seven blocks of the vocabulary, the last of five columns."""


@pytest.fixture
def narrow(monkeypatch):
    """Let blocks be narrow, so that a small vocabulary is many of them."""
    monkeypatch.setattr(module, "NARROWEST", NARROW)


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype)
    weight = torch.randn(V, H, dtype=dtype)
    return hidden, weight, torch.randn(V, dtype=dtype) if bias else None, torch.randint(V, (N,))


def by_autograd(hidden, weight, bias, tokens, softcap, temperature):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), (logits / temperature).logsumexp(-1)


def weighted(logprobs: torch.Tensor, entropy: torch.Tensor, entropy_grad: bool) -> torch.Tensor:
    w = torch.randn(2, len(logprobs), generator=torch.Generator().manual_seed(1)).to(logprobs.dtype)
    return logprobs @ w[0] + entropy @ w[1] if entropy_grad else logprobs @ w[0]


def exact(hidden, weight, bias, tokens, softcap=None, temperature=1.0, entropy_grad=False):
    """Return log-probs and entropies, and gradients of a weighted sum to hidden states and weight, all in float64."""
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy, _ = by_autograd(*doubles, tokens, softcap, temperature)
    gradients = torch.autograd.grad(weighted(logprobs, entropy, entropy_grad), doubles[:2])
    return logprobs.detach(), entropy.detach(), *gradients


def ours(hidden, weight, bias, tokens, softcap=None, temperature=1.0, entropy_grad=False, train_head=False, chunk=CHUNK):
    """Return what `exact` does, the gradient to the weight only with `train_head`."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(train_head)
    head = LMHead(weight, bias, softcap)
    found = token_logprobs(hidden, tokens, head, temperature=temperature, entropy_grad=entropy_grad, chunk_bytes=chunk)
    wanted = (hidden, weight) if train_head else (hidden,)
    gradients = torch.autograd.grad(weighted(found.logprobs, found.entropy, entropy_grad), wanted)
    return found.logprobs.detach(), found.entropy.detach(), *gradients


def assert_near(found, expected, tolerance=TOLERANCE):
    for mine, other in zip(found, expected, strict=False):
        torch.testing.assert_close(mine.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("narrowest", [module.NARROWEST, NARROW])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(
    ("bias", "softcap", "temperature"), [(False, None, 1.0), (True, 5.0, 0.7), (False, 3.0, 1.0), (True, None, 1.3)]
)
def test_equals_autograd_on_full_logits(train_head, entropy_grad, bias, softcap, temperature, narrowest, monkeypatch):
    monkeypatch.setattr(module, "NARROWEST", narrowest)
    ours, theirs = inputs(bias), inputs(bias)
    for hidden, weight, b, _ in (ours, theirs):
        hidden.requires_grad_()
        if train_head:
            weight.requires_grad_()
            if b is not None:
                b.requires_grad_()
    w = torch.randn(N, 2)
    logprobs, entropy, log_norm = token_logprobs(
        ours[0],
        ours[3],
        LMHead(ours[1], ours[2], softcap),
        temperature=temperature,
        entropy_grad=entropy_grad,
        chunk_bytes=CHUNK,
    )
    expected_logprobs, expected_entropy, expected_log_norm = by_autograd(*theirs, softcap, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(entropy, expected_entropy, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(log_norm, expected_log_norm.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    assert not log_norm.requires_grad
    if entropy_grad:
        (logprobs @ w[:, 0] + entropy @ w[:, 1]).backward()
        (expected_logprobs @ w[:, 0] + expected_entropy @ w[:, 1]).backward()
    else:
        assert not entropy.requires_grad
        (logprobs @ w[:, 0]).backward()
        (expected_logprobs @ w[:, 0]).backward()
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        if mine is not None and mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_hand_computed_two_words():
    # logits (0, ln 3): p = (1/4, 3/4); entropy = -(1/4 ln 1/4 + 3/4 ln 3/4) = 0.562335
    head = LMHead(torch.tensor([[0.0], [1.0]]))
    hidden = torch.tensor([[1.0986123]])
    out = token_logprobs(hidden, torch.tensor([1]), head)
    assert out.logprobs.item() == pytest.approx(-0.2876821, abs=1e-6)
    assert out.entropy.item() == pytest.approx(0.5623351, abs=1e-6)


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_of_size_n_by_v_forward_or_backward(train_head):
    vocabulary, count = 4096, 512
    hidden = torch.randn(count, 8, requires_grad=True)
    head = LMHead(torch.randn(vocabulary, 8, requires_grad=train_head))
    with LargestAllocation() as largest:
        logprobs = token_logprobs(hidden, torch.randint(vocabulary, (count,)), head, chunk_bytes=4 * vocabulary * 16).logprobs
        logprobs.sum().backward()
    assert largest.elements <= max(16 * vocabulary, vocabulary * 8)


def test_rows_and_vocabulary_are_cut_into_groups_and_blocks_that_fit(narrow):
    groups, blocks = module._cut(N, H, V, CHUNK)
    # 2020 bytes are 252 pairs of fp32 numbers, and 16 columns with 16 hidden units at least make 32 of them a row: 7 rows.
    assert [rows.stop - rows.start for rows in groups] == [7, 7, 7, 7, 7, 2]
    assert [columns.stop - columns.start for columns in blocks] == [16, 16, 16, 16, 16, 16, 5]
    # All rows of W1's update at once: 8 MiB are 2^20 pairs, 4096 a row, of which 512 are the sums'.
    groups, blocks = module._cut(256, 512, 32_000, 8 * 2**20)
    assert groups == [slice(0, 256)]
    assert blocks[0] == slice(0, 3584)
    assert blocks[-1] == slice(28_672, 32_000)
    assert module._cut(0, H, V, CHUNK)[0] == []


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("softcap", "bias", "temperature"), [(None, False, 1.0), (5.0, True, 0.7)])
def test_half_precision_head(train_head, entropy_grad, softcap, bias, temperature, narrow):
    hidden, weight, b, tokens = inputs(bias, torch.bfloat16)
    settings = {"softcap": softcap, "temperature": temperature, "entropy_grad": entropy_grad}
    found = ours(hidden, weight / 2, b, tokens, **settings, train_head=train_head)
    expected = exact(hidden, weight / 2, b, tokens, **settings)
    assert found[2].dtype is torch.bfloat16
    assert_near(found[:2], expected[:2], HALF_PRECISION)
    for mine, other in zip(found[2:], expected[2:], strict=False):
        assert (mine.double() - other).norm() < HALF_PRECISION * other.norm()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_gradient_of_a_probable_token_survives_half_precision(train_head, softcap, narrow):
    """p is nearly 1 and the gradient small; as the difference of two rounded sums it would be noise."""
    torch.manual_seed(0)
    weight = torch.randint(2, (V, H)).mul_(2).sub_(1).to(torch.bfloat16)  # 1 and -1: raw logits are integers, 16 at most, exact
    tokens = torch.tensor([2, 50, 100])
    found = ours(weight[tokens], weight, None, tokens, softcap, train_head=train_head)
    expected = exact(weight[tokens], weight, None, tokens, softcap)
    assert expected[0].exp().min() > 0.9
    for mine, other in zip(found[2].double(), expected[2], strict=True):
        assert (mine - other).norm() < HALF_PRECISION * other.norm()


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling", "last", "first"])
def test_wherever_the_largest_logit_is(order, train_head, entropy_grad, narrow):
    """A bias that makes the norm grow with each block, or come with the first or the last one alone."""
    hidden, weight, _, tokens = inputs(False)
    ramp = torch.linspace(0, 30, V)
    only = torch.zeros(V)
    only[-2] = 30.0
    bias = {"rising": ramp, "falling": ramp.flip(0), "last": only, "first": only.flip(0)}[order]
    tokens[:4] = torch.tensor([0, 1, V - 2, V - 1])
    found = ours(hidden, weight, bias, tokens, entropy_grad=entropy_grad, train_head=train_head)
    assert_near(found, exact(hidden, weight, bias, tokens, entropy_grad=entropy_grad), 2 * TOLERANCE)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
def test_logits_of_ten_thousand_overflow_nothing(train_head, entropy_grad, narrow):
    # Integers: the logits are exact in fp32, and so what is left are the errors of what is made of them.
    torch.manual_seed(0)
    hidden, weight = torch.randint(-3, 4, (N, H)).float(), torch.randint(-2, 3, (V, H)).float()
    bias = torch.randint(-10_000, 10_001, (V,)).float()
    tokens = torch.randint(V, (N,))
    found = ours(hidden, weight, bias, tokens, entropy_grad=entropy_grad, train_head=train_head)
    expected = exact(hidden, weight, bias, tokens, entropy_grad=entropy_grad)
    assert expected[0].min() < -10_000
    assert all(numbers.isfinite().all() for numbers in found)
    assert_near(found, expected)


@pytest.mark.parametrize("train_head", [False, True])
def test_the_size_of_the_blocks_changes_nothing(train_head, narrow):
    hidden, weight, bias, tokens = inputs(True)
    settings = {"softcap": 5.0, "temperature": 0.7, "entropy_grad": True, "train_head": train_head}
    whole = ours(hidden, weight, bias, tokens, **settings, chunk=2**20)
    for chunk in (1, 4 * V, CHUNK, 4 * V * 20):
        assert_near(ours(hidden, weight, bias, tokens, **settings, chunk=chunk), whole)


def test_a_hundred_blocks_round_no_more_than_one():
    torch.manual_seed(0)
    # Multiples of 1/8 by multiples of 1/4: the logits are exact, and only what is made of them is rounded.
    hidden, weight = (
        torch.randn(64, H).mul_(8).round_().div_(8),
        torch.randn(100 * module.NARROWEST, H).mul_(4).round_().div_(4),
    )
    tokens = torch.randint(len(weight), (64,))
    expected = by_autograd(hidden.double(), weight.double(), None, tokens, None, 1.0)
    for chunk in (8 * 64 * (module.NARROWEST + H), 2**28):
        found = token_logprobs(hidden, tokens, LMHead(weight), chunk_bytes=chunk)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=0, atol=ROUNDING)


def test_scoring_takes_one_product(narrow, monkeypatch):
    hidden, weight, bias, tokens = inputs(True)
    expected = ours(hidden, weight, bias, tokens)
    monkeypatch.setattr(lm_head, "times", None)  # a product for a gradient would raise
    with torch.no_grad():
        found = token_logprobs(hidden.requires_grad_(), tokens, LMHead(weight, bias), chunk_bytes=CHUNK)
    assert_near(found[:2], expected[:2], tolerance=0)
    with pytest.raises(TypeError):
        token_logprobs(hidden, tokens, LMHead(weight, bias), chunk_bytes=CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("softcap", "most"), [(None, 1.0), (5.0, 1.5)])
@pytest.mark.parametrize("vocabulary", [8192, 32_768])
def test_peak_is_the_chunk_and_what_is_kept(vocabulary, softcap, most, entropy_grad, dtype):
    count, width, chunk = 480, 64, 2**20
    hidden = torch.randn(count, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype)
    tokens = torch.randint(vocabulary, (count,))
    with LiveBytes([hidden, weight, tokens]) as live:
        before = live.bytes
        found = token_logprobs(hidden, tokens, LMHead(weight, None, softcap), entropy_grad=entropy_grad, chunk_bytes=chunk)
        weighted(found.logprobs, found.entropy, entropy_grad).backward()
    kept = hidden.element_size() * count * width * (2 if entropy_grad else 1)
    sums = 4 * 120 * width if entropy_grad else 0  # one more for each of the 2^17 / (1024 + 64) rows of a group
    numbers = 64 * count
    if entropy_grad and dtype is torch.bfloat16:
        most += 0.25  # one of two blocks is cast while the other waits
    assert live.peak - before <= most * chunk + kept + sums + numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("softcap", "most"), [(None, 1.0), (5.0, 1.5)])
@pytest.mark.parametrize("count", [480, 16])
def test_trained_head_has_its_gradient_and_no_second_one_in_fp32(count, softcap, most, entropy_grad, dtype):
    width, vocabulary, chunk = 64, 32_768, 2**20
    hidden = torch.randn(count, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    tokens = torch.randint(vocabulary, (count,))
    with LiveBytes([hidden, weight, tokens]) as live:
        before = live.bytes
        found = token_logprobs(hidden, tokens, LMHead(weight, None, softcap), entropy_grad=entropy_grad, chunk_bytes=chunk)
        weighted(found.logprobs, found.entropy, entropy_grad).backward()
    gradients = weight.numel() * weight.element_size() + 4 * count * width
    numbers = 64 * count
    # A block's part of the gradient and what is added to it take as much again as the block.
    assert live.peak - before <= gradients + (most + 1) * chunk + numbers


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_runs_on_fake_tensors(train_head, softcap, narrow):
    with FakeTensorMode():
        hidden, weight, bias, tokens = inputs(True)
        found = ours(hidden, weight, bias, tokens, softcap, 0.7, entropy_grad=True, train_head=train_head)
    assert [tuple(x.shape) for x in found] == [(N,), (N,), (N, H), (V, H)][: 4 if train_head else 3]


@pytest.mark.parametrize("token", [-100, -1, V])
@pytest.mark.parametrize("gradient", [False, True])
def test_refuses_tokens_that_are_none(token, gradient):
    hidden, weight, _, tokens = inputs(False)
    tokens[5] = token
    with nullcontext() if gradient else torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_logprobs(hidden.requires_grad_(), tokens, LMHead(weight))


def test_no_rows():
    hidden = torch.randn(0, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    found = token_logprobs(hidden, torch.zeros(0, dtype=torch.long), LMHead(weight))
    found.logprobs.sum().backward()
    assert found.logprobs.shape == (0,)
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize(("softcap", "bias", "temperature"), [(None, False, 1.0), (5.0, True, 0.7)])
def test_logits_of_a_few_rows(softcap, bias, temperature):
    hidden, weight, b, _ = inputs(bias)
    states = hidden[:36].view(4, 9, H)[:, -1]  # the last of each row, as a decoder takes them
    raw = torch.nn.functional.linear(states, weight, b)
    expected = (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature
    assert_near([LMHead(weight, b, softcap).logits(states, temperature)], [expected])
