"""What the contestants' numbers come to, and how they are shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_ppo.profiling.benchmarks.peers.floor import multiply_adds
from hydra_ppo.profiling.benchmarks.peers.results import MIB, Result, collect, floor_table, median_ratio, medians, table, write
from hydra_ppo.profiling.benchmarks.peers.workloads import WORKLOADS, contestants

TINY = WORKLOADS["tiny"]


def report(seconds: list[float], peak: int, phases: list[dict[str, float]] | None = None) -> dict:
    return {
        "peak_bytes": peak,
        "static_bytes": peak // 2,
        "versions": {"torch": "2"},
        "seconds": seconds,
        "phases": phases or [],
        "disturbed": [False for _ in seconds],
    }


def results(rates: dict[str, dict[str, float]] | None = None, **reports: dict) -> list[Result]:
    known = contestants(TINY)
    named = {name.replace("_", "-"): found for name, found in reports.items()}
    return collect(TINY, [known[name] for name in named], named, rates or {}, threads=2)


def test_ratio_is_taken_round_by_round():
    # 2/1, 30/10, 8/2 are 2, 3, 4. The ratio of the medians, 8/2, would let the slow second round decide.
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
    assert median_ratio([], []) is None


def test_medians_by_name():
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 8.0}, {"a": 2.0, "b": 1.0}]) == {"a": 2.0, "b": 8.0}
    assert medians([]) is None


def test_results_compare_with_ours_and_with_the_peer():
    ours, peer, half = results(
        hydra=report([1.0, 2.0, 3.0], 10 * MIB),
        trl112_lora=report([2.0, 8.0, 9.0], 25 * MIB),
        hydra_trunk1_bf16=report([0.5, 1.0, 3.0], 5 * MIB),
    )
    assert (ours.seconds_per_update, ours.seconds_ratio, ours.peak_ratio) == (2.0, 1.0, 1.0)
    assert ours.speedup == 3.0  # of 2/1, 8/2, 9/3
    assert (peer.seconds_per_update, peer.seconds_ratio, peer.speedup, peer.peak_ratio) == (8.0, 3.0, 1.0, 2.5)
    assert half.speedup == 4.0  # of 2/0.5, 8/1, 9/3
    assert half.responses_per_second == 4.0  # rows of the tiny workload in its median second
    assert (half.trunk_layers, half.dtype, half.static_bytes) == (1, "bf16", 5 * MIB // 2)
    assert (peer.trunk_layers, peer.dtype, peer.threads) == (0, "fp32", 2)


def test_without_ours_or_without_rounds_there_is_no_ratio():
    (alone,) = results(trl112_full=report([2.0, 4.0], MIB))
    assert (alone.seconds_ratio, alone.speedup, alone.peak_ratio) == (None, None, None)
    (peaks,) = results(hydra=report([], MIB))
    assert (peaks.seconds_per_update, peaks.responses_per_second, peaks.seconds_ratio, peaks.peak_ratio) == (None,) * 3 + (1.0,)


def test_fields_of_the_file(tmp_path: Path):
    write(results(hydra=report([1.0, 2.0], 3 * MIB)), tmp_path / "new" / "peers.json")
    (row,) = json.loads((tmp_path / "new" / "peers.json").read_text())
    asked = ("name", "workload", "trunk_layers", "dtype", "seconds_per_update", "responses_per_second")
    assert tuple(row)[:8] == (*asked, "peak_bytes", "static_bytes")
    assert tuple(row.values())[:8] == ("hydra", "tiny", 0, "fp32", 1.5, 4 / 1.5, 3 * MIB, 3 * MIB // 2)
    assert {workload.name for workload in WORKLOADS.values()} == {"tiny", "W1", "W2"}


def test_table():
    ours, peer = results(hydra=report([1.0, 2.0], 3 * MIB), trl112_lora=report([4.0, 4.0], 6 * MIB))
    (untimed,) = results(trl011_multi=report([], 2 * MIB))
    shown = table([replace(ours, disturbed=[False, True]), peer, untimed], "")
    columns = [list(column.cells) for column in shown.columns]
    assert columns[:4] == [
        ["hydra", "trl112-lora", "trl011-multi"],
        ["1.500 *", "4.000", "-"],
        ["2.667", "1.000", "-"],
        ["1.00", "3.00", "-"],  # of 4/1 and 4/2
    ]
    assert columns[4:] == [["3.00", "1.00", "-"], ["3.0", "6.0", "2.0"], ["1.00", "2.00", "-"], ["1.5", "3.0", "1.0"]]
    assert "* disturbed" in str(shown.caption)
    assert "does not say" not in str(shown.caption)
    assert "* disturbed" not in str(table([peer], "").caption)
    assert "does not say" in str(table([replace(peer, disturbed=[None, None])], "").caption)


def test_floor_beside_the_time_taken():
    work = multiply_adds(TINY, 1)
    rates = {"fp32": {"torch.matmul": 1e6, "products.linear": 2e6}}
    phases = [{"rollout": work["rollout"] / 5e5, "score": 9.0, "update": 1.0}] * 3
    (found, peer) = results(rates, hydra_trunk1=report([30.0] * 3, MIB, phases), trl112_full=report([1.0] * 3, MIB))
    assert peer.floor is None
    assert peer.phase_seconds is None
    assert found.floor is not None
    assert found.floor.multiply_adds == work
    # The rollout ran at half the rate of torch.matmul and at a quarter of the best kernel's.
    assert found.floor.share_torch_matmul["rollout"] == pytest.approx(0.5)
    assert found.floor.share_best_kernel["rollout"] == pytest.approx(0.25)
    assert found.floor.share_torch_matmul["update"] == pytest.approx(work["update"] / 1e6)
    shown = floor_table([found, peer], "")
    assert shown is not None
    first = [next(iter(column.cells)) for column in shown.columns]
    assert (first[:2], first[4:]) == (["hydra-trunk1", "rollout"], ["50%", "25%"])
    assert floor_table([peer], "") is None
