"""The clock of benchmarks knows three phases: what is neither rollout nor score is the update."""

from __future__ import annotations

import time

from hydra_ppo.profiling.benchmarks.phases import Clock


def test_phases_of_our_trainer_add_up(monkeypatch):
    now = iter([1.0, 4.0, 4.5, 6.0, 7.0, 7.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    for phase in ("rollout", "score", "update-actor", "update-critic", "optimizer", "end"):
        clock(phase)
    assert clock.seconds == {"rollout": 3.0, "score": 0.5, "update": 2.75}
    assert clock.phase is None
