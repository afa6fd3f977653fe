"""Products with frozen weights agree with exact ones, whatever kernel they go to."""

from __future__ import annotations

import platform

import pytest
import torch

from hydra_ppo.compute.products import SMALL, has_own_kernel, linear, times

SAME = 2e-6
"""Relative to the largest entry, in fp32."""


def agree(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((found.double() - exact).abs().max() <= SAME * exact.abs().max())


@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (2, 5, 64), (3, 1, 64), (800, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_x_times_the_transposed_weight(shape, bias):
    x, weight, b = torch.randn(shape), torch.randn(48, 64), torch.randn(48) if bias else None
    exact = x.double() @ weight.double().T + (b.double() if bias else 0.0)
    found = linear(x, weight, b)
    assert found.shape == exact.shape
    assert agree(found, exact)


def test_times_takes_transposed_and_strided_tensors():
    gradient, x, weight = torch.randn(800, 48), torch.randn(800, 64), torch.randn(48, 64)
    assert agree(times(gradient, weight), gradient.double() @ weight.double())
    assert agree(times(gradient.T, x), gradient.double().T @ x.double())
    assert agree(linear(x[::2], weight[:, :]), x[::2].double() @ weight.double().T)
    assert agree(linear(x[:, 16:48], weight[:, 16:48]), x[:, 16:48].double() @ weight[:, 16:48].double().T)


def test_no_rows_are_no_rows():
    assert linear(torch.zeros(0, 64), torch.randn(48, 64)).shape == (0, 48)


def test_results_are_memory_of_their_own():
    """The adapter's part is added in place."""
    x, weight = torch.randn(4, 64), torch.eye(64)
    linear(x, weight).zero_()
    assert x.abs().sum() > 0


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="torch's own choice elsewhere")
def test_the_other_kernel_is_for_fp32_on_a_cpu_and_can_be_switched_off():
    assert has_own_kernel(torch.zeros(1))
    assert not has_own_kernel(torch.zeros(1, dtype=torch.bfloat16))
    assert not has_own_kernel(torch.zeros(1, device="meta"))
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    assert x.numel() * weight.shape[0] >= SMALL
    with torch.backends.mkldnn.flags(enabled=False):
        assert not has_own_kernel(x)
        assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
