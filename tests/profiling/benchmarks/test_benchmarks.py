"""The benchmarks compare what is equal. No timing is asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hydra_ppo.profiling.benchmarks import bench_logprobs, bench_ppo, bench_roles
from hydra_ppo.profiling.benchmarks.measure import measure, peak_bytes

SMALL = bench_ppo.Sizes(hidden=16, layers=2, vocabulary=32, prompts=4, prompt_tokens=3, response_tokens=5, microbatch=2)


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target, rounds: int) -> None:
        for _ in range(rounds):
            target()
            self.rounds += 1


def test_calls_take_turns():
    order: list[str] = []
    benchmark = Benchmark()
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    measure(benchmark, "two calls", calls, rounds=2, repeats=3, baseline="b", tokens=10)
    assert "".join(order) == "ab" + 2 * "aaabbb"  # once to warm up
    info = benchmark.extra_info
    assert info["tokens_per_second"] == {name: 10 / seconds for name, seconds in info["seconds"].items()}
    assert (info["title"], info["baseline"], info["torch"]) == ("two calls", "b", torch.__version__)
    assert "peak_bytes" not in info


def test_peak_leaves_out_what_was_alive():
    kept = torch.zeros(100)  # 400 bytes
    benchmark = Benchmark()
    # doubled (400 bytes) and its square (400) live at once
    measure(benchmark, "square", {"square": lambda: (kept * 2).square()}, rounds=1, alive=[kept])
    assert benchmark.extra_info["peak_bytes"] == {"square": 800}
    assert peak_bytes(lambda: kept.add_(1), [kept]) == 0
    assert peak_bytes(lambda: kept + 1, []) == 800  # not named as alive, so it counts


def test_logprobs_agree():
    inputs = bench_logprobs.make_inputs(count=7, width=8, vocabulary=11)
    bench_logprobs.check_agreement(inputs)
    # by hand: p = softmax(W h), d log p(a) / d h = W^T (e_a - p), times what arrives
    p = (inputs.hidden.detach() @ inputs.weight.T).softmax(dim=-1)
    logprobs, gradient = bench_logprobs.from_full_logits(inputs)
    expected = inputs.weight[inputs.tokens] - p @ inputs.weight
    torch.testing.assert_close(logprobs, p[torch.arange(7), inputs.tokens].log())
    torch.testing.assert_close(gradient, expected * inputs.upstream[:, None])


def test_full_logits_hold_three_tensors_of_the_vocabulary():
    inputs = bench_logprobs.make_inputs(count=8, width=4, vocabulary=1000)
    peak = peak_bytes(lambda: bench_logprobs.from_full_logits(inputs), inputs.tensors())
    assert peak // (8 * 1000 * 4) == 3


def test_a_disagreement_is_noticed(monkeypatch):
    inputs = bench_logprobs.make_inputs(count=7, width=8, vocabulary=11)
    logprobs, gradient = bench_logprobs.from_full_logits(inputs)
    monkeypatch.setattr(bench_logprobs, "from_hidden_states", lambda inputs: (logprobs, gradient + 0.01))
    with pytest.raises(AssertionError):
        bench_logprobs.check_agreement(inputs)


def test_roles_agree():
    model, twin = bench_roles.make_models(layers=2, rank=2)
    bench_roles.check_agreement(model, twin)
    bench_roles.by_role(model)
    bench_roles.by_set_adapter(twin)
    bench_roles.check_agreement(model, twin)
    assert model.current_role is None


def test_phases_agree():
    step = bench_ppo.Step(SMALL)
    bench_ppo.check_agreement(step)
    assert step.sample().responses == step.experience.responses()
    before = [p.detach().clone() for p in step.trainer.updates.parameters["actor"]]
    step.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.trainer.updates.parameters["actor"], strict=True))
    # Nothing is left behind: a second update starts from the same bytes.
    alive = step.alive()
    step.update()
    assert len(step.alive()) == len(alive)
