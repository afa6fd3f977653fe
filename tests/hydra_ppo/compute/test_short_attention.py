"""Attention over short rows in bf16 is causal attention, forward and backward, whatever it is cut into."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from hydra_ppo.compute import short_attention
from hydra_ppo.compute.packing import worth_packing
from tests.families import FAMILIES, randomise

CPU = torch.device("cpu")
SHAPES = [(2, 4, 4, 5, 8), (3, 6, 2, 130, 16), (1, 8, 1, 300, 32), (2, 9, 3, 1, 8)]
"""Rows, heads, key-value heads, tokens, width: within a block, over its edge, over two, and one token."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    rows, heads, shared, tokens, width = shape
    source = torch.Generator().manual_seed(0)
    sizes = [(rows, tokens, count, width) for count in (heads, shared, shared, heads)]
    # As projections leave them: heads side by side in memory.
    return [torch.randn(size, generator=source).to(dtype).transpose(1, 2) for size in sizes]


def results(attend, q, k, v, gradient):
    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    out = attend(*leaves)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def exact(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def distance(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("at_once", [1, 2**18])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_fp32_it_is_exact_but_for_the_order_of_sums(monkeypatch, shape, at_once):
    monkeypatch.setattr(short_attention, "AT_ONCE", at_once)
    parts = inputs(shape, torch.float32)
    expected = results(exact, *(part.double() for part in parts))
    for found, value in zip(results(short_attention.attend, *parts), expected, strict=True):
        assert found.shape == value.shape
        assert torch.allclose(found.double(), value, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_in_bf16_it_rounds_no_more_than_the_fused_kernel(shape):
    parts = inputs(shape, torch.bfloat16)
    expected = results(exact, *(part.double() for part in parts))
    ours, fused = results(short_attention.attend, *parts), results(exact, *parts)
    for found, other, value in zip(ours, fused, expected, strict=True):
        assert distance(found, value) <= 1.3 * distance(other, value)


def test_two_tokens_by_hand():
    # Scores of the second query are 0 and log 3, so its weights are 1/4 and 3/4.
    q = torch.tensor([[[[7.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [torch.log(torch.tensor(3.0)).item()]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    assert short_attention.attend(q, k, v, 1.0).flatten().tolist() == pytest.approx([4.0, 7.0])
    assert short_attention.attend(q, k, v, 0.0).flatten().tolist() == pytest.approx([4.0, 6.0])


def test_it_is_taken_for_short_rows_in_bf16_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(short_attention, "multiplies_bf16", lambda: True)
    assert short_attention.wins(torch.bfloat16, CPU, short_attention.LONGEST)
    assert not short_attention.wins(torch.bfloat16, CPU, short_attention.LONGEST + 1)
    assert not short_attention.wins(torch.float32, CPU, 8)
    assert not short_attention.wins(torch.bfloat16, torch.device("cuda"), 8)
    with FakeTensorMode():  # a simulation, which is one of a GPU
        assert not short_attention.wins(torch.bfloat16, CPU, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not short_attention.wins(torch.bfloat16, CPU, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not short_attention.wins(torch.bfloat16, CPU, 8)
    monkeypatch.setattr(short_attention, "multiplies_bf16", lambda: False)
    assert not short_attention.wins(torch.bfloat16, CPU, 8)


def test_rows_without_padding_are_packed_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(short_attention, "multiplies_bf16", lambda: True)
    assert worth_packing([4, 4], 4, torch.bfloat16, CPU)
    assert not worth_packing([4, 4], 4, torch.float32, CPU)
    assert worth_packing([4, 3], 4, torch.float32, CPU)


def test_a_model_in_bf16_trains_through_it(monkeypatch):
    monkeypatch.setattr(short_attention, "multiplies_bf16", lambda: True)
    from hydra_ppo.experience import Experience
    from hydra_ppo.model.hydra import HydraModel

    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES["llama"], dtype="bf16")
    randomise(model)
    rows = Experience.from_lists([[5, 6, 7], [8, 9, 10]], [[11, 12], [13, 14]], 0, CPU).sequences()

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        with model.role("actor"):
            found = model.logprobs(rows).logprobs
            found.sum().backward()
        parts = [p.grad.flatten() for p in model.role_parameters("actor").values() if p.grad is not None]
        model.zero_grad()
        return found.detach(), torch.cat(parts)

    calls = []
    attend = short_attention.attend
    monkeypatch.setattr(short_attention, "attend", lambda *args: calls.append(1) or attend(*args))
    found = gradients()
    assert calls
    monkeypatch.setattr(short_attention, "LONGEST", 0)
    expected = gradients()
    assert torch.allclose(found[0], expected[0], atol=0.05)
    assert distance(found[1], expected[1]) < 0.05
