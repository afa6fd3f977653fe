"""Rows in 8 and 4 bits: numbers by hand, blocks against the whole, and log-probs exact for the rounded head."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.compute import logprobs as module
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.compute.quantized_rows import GROUP, QuantizedRows
from hydra_ppo.runtime.memory import LiveBytes
from tests.hydra_ppo.compute.test_logprobs import assert_near, exact, weighted

V, H, N = 333, 128, 29
CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]


def rows(kind, dtype=torch.float32, count=V) -> tuple[QuantizedRows, torch.Tensor]:
    torch.manual_seed(3)
    weight = torch.randn(count, H, dtype=dtype)
    return QuantizedRows.of(weight, kind, dtype, CPU), weight


def test_int8_by_hand():
    weight = torch.zeros(1, 2 * GROUP)
    weight[0, :3] = torch.tensor([1.27, -0.014, 0.006])  # a scale of 0.01: 127, -1, 1
    weight[0, GROUP] = -254.0  # of the other group, 2
    held = QuantizedRows.of(weight, "int8", torch.float32, CPU)
    assert held.values[0, :4].tolist() == [127, -1, 1, 0]
    assert held.values[0, GROUP : GROUP + 2].tolist() == [-127, 0]
    torch.testing.assert_close(held[0, ...][:3], torch.tensor([1.27, -0.01, 0.01]))
    assert held[0][GROUP].item() == -254.0
    assert held[1:].shape == (0, 2 * GROUP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step_at_most(dtype):
    held, weight = rows("int8", dtype)
    step = weight.float().unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True) / 127
    away = (held[:].float() - weight.float()).unflatten(1, (-1, GROUP)).abs()
    # The scale is rounded to the compute type, and so is what comes out.
    rounding = weight.float().unflatten(1, (-1, GROUP)).abs() * torch.finfo(dtype).eps
    assert (away <= step * (0.5 + 64 * torch.finfo(dtype).eps) + rounding).all()


def test_nf4_is_what_bitsandbytes_makes():
    import bitsandbytes.functional as bnb

    held, weight = rows("nf4")
    expected = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4"))
    assert torch.equal(held[:], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_are_those_of_the_whole(kind):
    held, _ = rows(kind)
    whole = held[:]
    tokens = torch.tensor([[5, 0], [332, 5]])
    assert torch.equal(held[tokens], whole[tokens])
    assert torch.equal(held[7], whole[7])
    assert torch.equal(torch.cat([held[part] for part in held.blocks(7 * H * 4)]), whole)
    assert [part.stop for part in held.blocks(200 * H * 4)] == [200, 333]
    assert held.shape == (V, H)
    assert len(held) == V


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_bytes_that_it_says(kind):
    held, _ = rows(kind, torch.bfloat16)
    found = sum(buffer.numel() * buffer.element_size() for buffer in held.buffers())
    assert found == V * H // (1 if kind == "int8" else 2) + V * H // GROUP * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("bias", "softcap", "temperature"), [(False, None, 1.0), (True, 5.0, 0.7)])
def test_logprobs_entropy_and_gradient_are_exact_for_the_rounded_head(
    kind, entropy_grad, bias, softcap, temperature, monkeypatch
):
    monkeypatch.setattr(module, "NARROWEST", 16)
    held, _ = rows(kind)
    hidden, b, tokens = torch.randn(N, H) / 8, torch.randn(V) if bias else None, torch.randint(V, (N,))
    expected = exact(hidden, held[:], b, tokens, softcap, temperature, entropy_grad)
    hidden.requires_grad_()
    head = LMHead(held, b, softcap)
    found = token_logprobs(
        hidden, tokens, head, temperature=temperature, entropy_grad=entropy_grad, chunk_bytes=4 * (V + H) * 9
    )
    (gradient,) = torch.autograd.grad(weighted(found.logprobs, found.entropy, entropy_grad), hidden)
    assert_near((found.logprobs.detach(), found.entropy.detach(), gradient), expected[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_a_bf16_head_give_what_the_whole_gives(kind):
    held, _ = rows(kind, torch.bfloat16)
    hidden, tokens = torch.randn(N, H, dtype=torch.bfloat16) / 8, torch.randint(V, (N,))
    of_blocks = token_logprobs(hidden, tokens, LMHead(held), chunk_bytes=2**16)
    of_whole = token_logprobs(hidden, tokens, LMHead(held[:]))
    assert_near(of_blocks[:2], of_whole[:2], tolerance=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_few_rows_and_those_with_a_graph(kind):
    held, _ = rows(kind)
    hidden = torch.randn(3, H).requires_grad_()
    plain = hidden.detach().clone().requires_grad_()
    expected = plain @ held[:].T
    assert_near([LMHead(held).logits(hidden.detach())], [expected.detach()])
    found = LMHead(held).raw(hidden)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_near([found.detach(), hidden.grad], [expected.detach(), plain.grad])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_none_is_refused(kind):
    held, _ = rows(kind)
    with pytest.raises((IndexError, RuntimeError)):
        token_logprobs(torch.randn(1, H), torch.tensor([V]), LMHead(held))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_head_is_never_there(kind):
    held, _ = rows(kind, count=20_000)
    hidden, tokens = torch.randn(64, H).requires_grad_(), torch.randint(20_000, (64,))
    chunk = 2**20
    with LiveBytes([*held.buffers(), hidden, tokens]) as live:
        before = live.bytes
        token_logprobs(hidden, tokens, LMHead(held), chunk_bytes=chunk).logprobs.sum().backward()
    # The block itself, what it is made from, and the temporaries of the log-probs.
    assert live.peak - before <= 3.5 * chunk + 4 * 64 * H * 4
    assert live.peak - before < 20_000 * H * 4 / 2
