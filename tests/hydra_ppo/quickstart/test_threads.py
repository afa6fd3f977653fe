"""How many threads the quickstart uses."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.quickstart import threads
from hydra_ppo.quickstart.corpus import build_llama_config


def test_candidates():
    assert [threads.candidates(most) for most in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_counts_take_turns_and_the_first_round_does_not_count():
    now, used, calls = 0.0, [], []

    def run():
        nonlocal now
        calls.append(used[-1])
        now += 100.0 if len(calls) <= 2 else {1: 3.0, 2: 2.0}[used[-1]]

    found = threads.medians([1, 2], run, used.append, clock=lambda: now)
    assert found == {1: 3.0, 2: 2.0}
    assert calls == [1, 2] * (threads.ROUNDS + 1)


def test_more_threads_must_be_worth_it():
    assert threads.fewest({1: 1.25, 2: 1.0}) == 1
    assert threads.fewest({1: 1.4, 2: 1.0}) == 2
    assert threads.fewest({1: 4.0, 2: 2.1, 4: 2.0, 8: 1.9}) == 2


@pytest.mark.parametrize("best", [1, 2])
def test_the_fastest_is_used_and_nothing_that_is_drawn_later_changes(best, monkeypatch):
    used = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(
        threads, "medians", lambda counts, run, use: run() or {count: abs(count - best) + 0.5 for count in counts}
    )
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    line = threads.choose_threads(build_llama_config(64))
    assert torch.equal(torch.rand(2), expected)
    assert used == [best]
    assert line.startswith(f"{best} thread")


def test_what_the_user_has_set_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("changed"))
    assert threads.choose_threads(build_llama_config(64)) is None
