"""Moments in host memory beside a true GPU: pinned, copied on a stream of their own, and the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hydra_ppo.runtime.host_tensors import is_on_host
from hydra_ppo.training import offloaded
from hydra_ppo.training.away import bring_back, send_away
from hydra_ppo.training.optim import load_optimizer, save_optimizer, state_tensors
from tests.gpu.test_gpu import DEVICE, needs_bitsandbytes
from tests.hydra_ppo.training.test_optimizers import assert_same, build, parameters, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]


def on_gpu() -> list[nn.Parameter]:
    """Return small parameters, and two whose moments take whole buckets, so that copies are under way at the same time."""
    generator = torch.Generator().manual_seed(5)
    large = [nn.Parameter(torch.randn(1500, 1000, generator=generator)) for _ in range(2)]
    return [nn.Parameter(p.detach().to(DEVICE)) for p in (*parameters()[:4], *large)]


@pytest.mark.parametrize("size", [8 * 2**20, 64 * 1024])
def test_offloaded_moments_give_the_bits_of_adamw(size, monkeypatch):
    monkeypatch.setattr(offloaded, "BUCKET_BYTES", size)
    plain, mine = on_gpu(), on_gpu()
    adamw, off = build(plain), build(mine, "adamw-offloaded")
    run(*adamw[:2], plain, range(8))
    run(*off[:2], mine, range(8))
    assert_same(mine, plain)
    for one, other in zip(plain, mine, strict=True):
        state = off[0].state[other]
        assert state["exp_avg"].is_pinned()
        assert state["exp_avg"].device.type == "cpu"
        for kind, value in adamw[0].state[one].items():
            assert torch.equal(value.cpu(), state[kind].cpu()), kind


def test_a_step_leaves_only_counts_on_the_gpu():
    mine = on_gpu()
    before = torch.cuda.memory_allocated()
    optimizer, schedule, _ = build(mine, "adamw-offloaded")
    run(optimizer, schedule, mine, range(2))
    for parameter in mine:
        parameter.grad = None
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 64 * 1024


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_state_that_leaves_and_comes_back_changes_no_bit(name):
    if name != "adamw":
        needs_bitsandbytes()
    plain, mine = on_gpu(), on_gpu()
    run(*build(plain, name)[:2], plain, range(5))
    optimizer, schedule, _ = build(mine, name)
    for number in range(5):
        bring_back(optimizer)
        run(optimizer, schedule, mine, [number])
        send_away(optimizer)
    assert_same(mine, plain)
    assert all(t.is_pinned() for t in state_tensors(optimizer) if is_on_host(t))


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "paged-adamw-8bit", "adamw-offloaded"])
def test_a_run_in_two_parts_has_the_bits_of_one(name):
    if "8bit" in name:
        needs_bitsandbytes()
    whole, first = on_gpu(), on_gpu()
    run(*build(whole, name)[:2], whole, range(7))
    optimizer, schedule, names = build(first, name)
    run(optimizer, schedule, first, range(3))
    tensors, values = save_optimizer(optimizer, schedule, names)
    tensors = {kind: value.detach().cpu().clone() for kind, value in tensors.items()}
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer, schedule, names = build(second, name)
    load_optimizer(optimizer, schedule, names, tensors, values)
    run(optimizer, schedule, second, range(3, 7))
    assert_same(second, whole)
    if name == "paged-adamw-8bit":
        assert any(is_on_host(t) for t in state_tensors(optimizer))
