"""The tracker counts every storage once, says what it is for, and its parts add up to the whole."""

from __future__ import annotations

import torch

from hydra_ppo.profiling.measuring import record
from hydra_ppo.profiling.measuring.record import SHARED
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.host_tensors import to_host

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * 256)  # fp32


def test_a_storage_counts_once_and_until_it_dies():
    with Tracker() as tracker:
        a = kib(4)
        view = a[:100]
        b = a + 1
        assert tracker.bytes == 8 * KIB
        del a
        assert tracker.bytes == 8 * KIB  # the view keeps it
        del view
        assert tracker.bytes == 4 * KIB
        del b
        assert tracker.bytes == 0
    assert tracker.peaks()["load"].bytes == 8 * KIB


def test_what_the_host_keeps_is_counted_apart():
    with Tracker() as tracker:
        on_device = kib(4)
        kept = to_host(on_device)
        del on_device
        assert (tracker.bytes, tracker.host_bytes) == (0, 4 * KIB)
        tracker.label([kept], "optimizer")  # which does not move it
        back = kib(4).copy_(kept)
        assert (tracker.bytes, tracker.host_bytes) == (4 * KIB, 4 * KIB)
        del kept, back
        assert (tracker.bytes, tracker.host_bytes, tracker.host_peak) == (0, 0, 4 * KIB)
    assert tracker.peaks()["load"].bytes == 4 * KIB


def test_what_was_there_before_counts_from_its_first_use():
    old = kib(4)
    with Tracker() as tracker:
        new = old * 2
        assert tracker.bytes == 8 * KIB
    del old, new


def test_phases_have_peaks_of_their_own_and_a_phase_that_comes_again_keeps_the_highest():
    with Tracker() as tracker:
        tracker.phase("rollout")
        kib(8)
        tracker.phase("score")
        kept = kib(2)
        kib(1)
        tracker.phase("rollout")
        kib(3)
    peaks = tracker.peaks()
    assert {phase: peak.bytes // KIB for phase, peak in peaks.items()} == {"rollout": 8, "score": 3}
    assert [(phase, peak.bytes // KIB) for phase, peak in tracker.stretch_peaks()] == [
        *(("rollout", 8), ("score", 3), ("rollout", 5)),
    ]
    del kept


def test_kinds_and_roles_of_a_peak_add_up():
    role = None
    with Tracker(role=lambda: role) as tracker:
        weights = kib(5)
        tracker.label([weights], "base weights")
        tracker.phase("rollout")
        role = "actor"
        activation = kib(3)
        with allocating("kv cache"):
            cache = kib(2)
        role = None
        with allocating("experience"):
            ids = kib(1)
        stray = kib(7)
    peak = tracker.peaks()["rollout"]
    assert peak.by_role == {
        SHARED: {"base weights": 5 * KIB, "experience": KIB, "other": 7 * KIB},
        "actor": {"activations": 3 * KIB, "kv cache": 2 * KIB},
    }
    assert sum(peak.kinds.values()) == peak.bytes == 18 * KIB
    del weights, activation, cache, ids, stray


def test_gradients_are_known_by_the_role_of_their_parameter():
    parameter = torch.nn.Parameter(torch.ones(256))
    with Tracker(role=lambda: "critic") as tracker:
        tracker.watch({"actor": [parameter]})
        tracker.phase("update-actor")
        (parameter * 2).sum().backward()
        tracker.phase("optimizer")
    assert tracker.peaks()["optimizer"].by_role["actor"] == {"gradients": KIB}
    parameter.grad = None
    (parameter * 2).sum().backward()  # the hooks are gone
    assert len(tracker._hooks) == 0


def test_what_the_optimizer_makes_is_its_own():
    parameter = torch.nn.Parameter(torch.ones(256))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(256)
    with Tracker() as tracker:
        tracker.phase("optimizer")
        optimizer.step()
    kinds = tracker.peaks()["optimizer"].kinds
    assert kinds["optimizer"] >= 2 * KIB  # two moments


def test_the_largest_storages_say_where_they_came_from():
    with Tracker(role=lambda: "actor") as tracker:
        tracker.phase("score")
        leak = torch.zeros(2, 3, 100).exp()
        tracker.phase("optimizer")
        small = kib(1)
    largest = tracker.peaks()["optimizer"].largest[0]
    assert (largest.shape, largest.phase, largest.role, largest.kind) == ((2, 3, 100), "score", "actor", "activations")
    assert largest.operation == "aten::exp"
    del leak, small


def test_a_timeline_keeps_the_peak_however_few_samples_it_has():
    with Tracker() as tracker:
        tracker.phase("rollout")
        for _ in range(50):
            kib(1)
        kib(9)
        tracker.phase("score")
        for _ in range(50):
            kib(2)
    for samples in (4, 1000):
        timeline = tracker.timeline(samples=samples)
        totals = [sum(column) for column in zip(*timeline.kinds.values(), strict=True)]
        assert max(totals) == 9 * KIB
        assert [phase for phase, _ in timeline.phases] == ["rollout", "score"]
        assert max(totals[timeline.phases[1][1] :]) == 2 * KIB
        assert len(totals) <= max(samples + 2, 204)


def test_a_missing_package_has_no_version(monkeypatch):
    """bitsandbytes is not needed for an unquantised profile."""
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    found = record.versions("peft")
    assert found["torch"] == torch.__version__
    assert found["no-such-package"] is None
    assert found.keys() == {"python", "torch", "no-such-package", "peft"}
