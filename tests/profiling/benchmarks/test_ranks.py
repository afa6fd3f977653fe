from __future__ import annotations

from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS
from hydra_ppo.profiling.benchmarks.ranks import compare


def test_teams_take_turns():
    found = compare([1, 2], WORKLOADS["tiny"], 2)
    assert list(found["sizes"]) == ["1", "2"]
    assert found["sizes"]["1"]["speed"] == 1.0
    assert found["sizes"]["1"]["waiting"] == 0.0
    assert 0 < found["sizes"]["2"]["waiting"] < 1
    assert len(found["sizes"]["2"]["speeds"]) == 2
