"""Attention is timed within the phases of a step, and computes what it did before."""

from __future__ import annotations

import time

import pytest
import torch

from hydra_ppo.profiling.benchmarks.attention_time import AttentionClock, timed_attention


def test_clock_by_hand(monkeypatch):
    now = iter([0.0, 3.0, 5.0, 6.0, 7.5, 8.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = AttentionClock()
    clock("rollout")  # at 0
    clock("score")  # 3
    clock("update-actor")  # 5
    with clock.paying_attention():  # 6 to 7.5
        pass
    clock("optimizer")  # 8
    clock("end")  # 9
    assert clock.seconds == {"rollout": 3.0, "score": 2.0, "update": 4.0}
    assert clock.attention == {"rollout": 0.0, "score": 0.0, "update": 1.5}


def test_timed_attention_changes_no_number():
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention
    inputs = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 2, 5, 4)

    def run() -> list[torch.Tensor]:
        output = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    expected = run()
    clock = AttentionClock()
    clock("update-actor")
    with timed_attention(clock):
        assert functional.scaled_dot_product_attention is not plain
        found = run()
        forward_and_backward = clock.attention["update"]
        with torch.no_grad():
            torch.testing.assert_close(functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3), found[0])
    assert 0 < forward_and_backward < clock.attention["update"]
    assert functional.scaled_dot_product_attention is plain
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_attention_is_itself_again_after_an_error():
    plain = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), timed_attention(AttentionClock()):
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is plain
