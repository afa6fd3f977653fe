"""Live bytes by phase, and checkpoints on disk."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.config.settings import OptimizerSettings
from hydra_ppo.runtime.host_tensors import is_on_host, to_host
from hydra_ppo.runtime.memory import LiveBytes, PhaseMemory
from hydra_ppo.training.optim import build_optimizer, clip_gradients

CPU = torch.device("cpu")


def test_live_bytes_by_hand():
    kept = torch.zeros(100)  # 400 bytes
    with LiveBytes([kept]) as live:
        a = kept + 1  # 400 more
        b = a.view(10, 10)  # an alias: nothing
        c = b @ b  # 400 more
        del a, b
        assert live.bytes == 800
        c.add_(1)  # in place: nothing
        assert live.bytes == 800
        del c
        assert live.bytes == 400
    assert live.peak == 1200


def test_a_tensor_counts_once_even_when_seen_late():
    early = torch.zeros(100)
    with LiveBytes() as live:
        early.sum()
        early.mean()
        assert live.bytes == 400 + 0
    assert live.peak == 400 + 4 + 0


def test_what_the_host_keeps_is_left_out():
    device = torch.arange(100.0)
    with LiveBytes() as live:
        kept = to_host(device)
        assert live.bytes == 400  # what was copied, not the copy
    with LiveBytes() as live:  # one that did not see it made
        kept[:50].add_(1)
        assert live.bytes == 0
    assert kept.tolist() == [*range(1, 51), *range(50, 100)]
    assert not is_on_host(kept + 1)


def test_phases_have_their_own_peaks():
    module = torch.nn.Linear(10, 10)  # 440 bytes
    memory = PhaseMemory(module, CPU, "always")
    with memory.step(0):
        memory("rollout")
        big = torch.zeros(1000)
        del big
        memory("score")
        small = torch.zeros(10)
        del small
    assert memory.peaks == {"rollout": 440 + 4000, "score": 440 + 40}
    assert memory.metrics() == {"memory/rollout_peak_bytes": 4440, "memory/score_peak_bytes": 480}


@pytest.mark.parametrize(("mode", "measured"), [("never", []), ("auto", [0, 1]), ("always", [0, 1, 2, 3])])
def test_modes(mode, measured):
    memory = PhaseMemory(torch.nn.Linear(2, 2), CPU, mode)
    found = []
    for step in range(4):
        with memory.step(step):
            memory("rollout")
            torch.zeros(3)
        if memory.peaks:
            found.append(step)
    assert found == measured


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 2 of warm-up: 0, 1/2, 1, then flat, linear to 0 or half a cosine to 0
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 7 / 8, 6 / 8]),
        ("cosine", [0.0, 0.5, 1.0, 0.96194, 0.853553]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = OptimizerSettings(learning_rate=2.0, schedule=schedule, warmup_fraction=0.2)
    optimizer, scheduler = build_optimizer([({"p": parameter}, 2.0)], settings, total_steps=10)
    found = []
    for _ in expected:
        found.append(scheduler.get_last_lr()[0] / 2.0)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, abs=1e-5)


def test_adamw_settings_reach_the_optimizer():
    parameter = torch.nn.Parameter(torch.zeros(1))
    settings = OptimizerSettings(learning_rate=0.3, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer, _ = build_optimizer([({"p": parameter}, 0.3), ({"again": parameter}, 0.5)], settings, total_steps=1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 0]
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.3, 0.1, (0.8, 0.9), 1e-6)


def test_clip_gradients_by_hand():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None).item() == 5.0
    assert parameters[0].grad.item() == 3.0
    assert clip_gradients(parameters, 1.0).item() == 5.0
    assert parameters[0].grad.item() == pytest.approx(0.6, abs=1e-5)
