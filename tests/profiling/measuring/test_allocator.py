"""The CUDA allocator's numbers by phase, with a stand-in for it."""

from __future__ import annotations

import torch

from hydra_ppo.profiling.measuring.allocator import Allocator, snapshot


def test_peaks_are_kept_by_phase_and_reset_between_them(monkeypatch):
    peaks = iter([(5, 8), (9, 9), (3, 9)])
    current = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda place: current.append(next(peaks, (0, 0))))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda place: current[-1][0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda place: current[-1][1])
    allocator = Allocator(torch.device("cuda"))
    for phase in ("rollout", "score", "rollout", "end"):
        allocator(phase)
    assert allocator.peaks == {
        "rollout": {"max_memory_allocated": 5, "max_memory_reserved": 9},
        "score": {"max_memory_allocated": 9, "max_memory_reserved": 9},
    }


def test_on_a_cpu_there_is_nothing_to_read(tmp_path):
    allocator = Allocator(torch.device("cpu"))
    for phase in ("rollout", "end"):
        allocator(phase)
    assert allocator.peaks == {}
    with snapshot(torch.device("cpu"), tmp_path / "record.pickle"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_snapshot_is_written_and_recording_stops_also_after_an_error(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    path = tmp_path / "new" / "record.pickle"
    with snapshot(torch.device("cuda"), path):
        pass
    assert calls[1:] == [str(path), {"enabled": None}]
    calls.clear()
    try:
        with snapshot(torch.device("cuda"), path):
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert calls[1:] == [{"enabled": None}]
