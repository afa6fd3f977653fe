"""token_logprobs against autograd on the full logits, and its memory bound."""

import pytest
import torch

from hydra_ppo.logprobs import LMHead, token_logprobs
from tests.allocations import LargestAllocation

TOLERANCE = 1e-5
N, H, V = 37, 16, 101


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


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(
    ("bias", "softcap", "temperature"), [(False, None, 1.0), (True, 5.0, 0.7), (False, 3.0, 1.0), (True, None, 1.3)]
)
def test_equals_autograd_on_full_logits(train_head, entropy_grad, bias, softcap, temperature):
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
        chunk_bytes=4 * V * 5,
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
