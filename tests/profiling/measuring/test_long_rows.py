"""Offloaded checkpoints and pieces of rows, counted: simulated as measured, at every depth, and nothing is T x T."""

from __future__ import annotations

import pytest

from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.recording import Scale
from hydra_ppo.profiling.measuring.shallow import simulated_step, with_depth
from hydra_ppo.profiling.measuring.tracker import Tracker
from tests.profiling.measuring.test_capture import AGREEMENT, assert_adds_up
from tests.profiling.models import CONFIGS, workload

PREDICTED = 0.002
"""Largest relative difference between a prediction and a simulation of the whole depth."""

CHANGES = [{"checkpoint_offload": True}, {"tile_tokens": 32}, {"checkpoint_offload": True, "tile_tokens": 32}]


@pytest.mark.parametrize(
    ("family", "quantization", "changes"),
    [*(("llama", "nf4", changes) for changes in CHANGES), ("llama", None, CHANGES[2]), ("gemma3", None, CHANGES[2])],
    ids=str,
)
def test_simulated_and_measured_peaks_agree(family, quantization, changes):
    """A micro-batch has 72 tokens here, and the four prompts have 96: three pieces each."""
    sizes = workload(quantization=quantization, microbatch=2, score_batch=2, **changes)
    simulated = capture(sizes, simulate=True, config=CONFIGS[family])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS[family])
    for phase, peak in measured.phases.items():
        assert_adds_up(peak)
        if phase != "load":
            assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.host_bytes == measured.host_bytes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", CHANGES[0] | {"quantization": "nf4", "dtype": "bf16"}),
        ("llama", CHANGES[1] | {"microbatch": 2, "score_batch": 2}),
        ("llama", CHANGES[2] | {"quantization": "nf4"}),
        ("llama", CHANGES[2] | {"trunk_layers": 3, "microbatch": 2, "score_batch": 2}),
        ("gpt2", CHANGES[0]),
    ],
    ids=str,
)
def test_two_shallow_models_predict_a_deep_one(family, changes):
    sizes, config = workload(**changes), with_depth(CONFIGS[family], 7)
    scale = Scale(sizes.rollout_batch, sizes.microbatch, sizes.rank)
    predicted = simulated_step(sizes, config, (sizes.microbatch,)).phases(7, scale, sizes.trunk_layers)
    deep = capture(sizes, simulate=True, config=config)
    for phase in set(deep.phases) - {"load"}:
        assert predicted[phase] == pytest.approx(deep.phases[phase].bytes, rel=PREDICTED), phase


def test_the_host_holds_the_checkpoints_of_one_pass():
    """Layers x micro-batch x tokens x hidden size, in the base's type; the critic's pass comes after the actor's is gone."""
    sizes = workload(microbatch=2, checkpoint_offload=True, dtype="bf16")
    held = capture(sizes, simulate=True, config=CONFIGS["llama"]).host_bytes
    assert held == 4 * 2 * (24 + 12) * 128 * 2
    assert capture(workload(microbatch=2), simulate=True, config=CONFIGS["llama"]).host_bytes == 0


def test_less_is_held_with_each_and_least_with_both():
    peaks = []
    for changes in ({}, *CHANGES):
        peaks.append(capture(workload(prompt=224, response=32, **changes), simulate=True, config=CONFIGS["llama"]).phases)
    plain, offloaded, tiled, both = ([p[phase].bytes for phase in ("update-actor", "update-critic")] for p in peaks)
    assert all(a < b for a, b in zip(offloaded, plain, strict=True))
    assert all(a < b for a, b in zip(tiled, plain, strict=True))
    assert all(a < min(b, c) for a, b, c in zip(both, offloaded, tiled, strict=True))
    assert peaks[2]["score"].bytes < peaks[0]["score"].bytes


def test_nothing_is_tokens_by_tokens():
    """4096 tokens through actor update, critic update, scoring and sampling: no storage is as long in two of its dimensions.

    What is as long as the row and wider than a hidden state is a piece of the MLP at most.
    """
    tracker = Tracker()
    sizes = workload(
        prompt=4032, response=64, rollout_batch=1, dtype="bf16", tile_tokens=512, checkpoint_offload=True, score_batch=1
    )
    capture(sizes, simulate=True, config=with_depth(CONFIGS["llama"], 2), tracker=tracker, timeline=False)
    made = [s for s in tracker.storages if s.phase in ("rollout", "score", "update-actor", "update-critic")]
    assert {s.phase for s in made} == {"rollout", "score", "update-actor", "update-critic"}
    assert [s for s in made if sum(size >= 4095 for size in s.shape) > 1] == []
    assert [s for s in made if s.bytes >= 4095 * 4095] == []
    longest = max(s.shape[-2] for s in made if len(s.shape) > 1 and s.shape[-1] == 384 and s.shape[-2] != 128)
    assert longest == 512
