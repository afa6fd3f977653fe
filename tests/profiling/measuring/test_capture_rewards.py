"""A simulation counts reward heads, and what the losses of a reward model keep, as a real step does."""

from __future__ import annotations

import pytest

from hydra_ppo.profiling.measuring.capture import capture
from tests.profiling.measuring.test_capture import AGREEMENT, assert_adds_up
from tests.profiling.models import CONFIGS, workload


def both(sizes, method, stage):
    return [
        capture(sizes, method, simulate=simulate, device="cpu", stage=stage, config=CONFIGS["llama"])
        for simulate in (True, False)
    ]


@pytest.mark.parametrize(
    "changes",
    [{"reward_heads": 5}, {"reward_heads": 3, "reward_loss": "divergent"}, {"reward_heads": 3, "reward_loss": "advantage"}],
    ids=str,
)
def test_simulated_and_measured_peaks_agree_in_reward_training(changes):
    simulated, measured = both(workload(microbatch=2, **changes), "lora", "reward")
    for phase, peak in measured.phases.items():
        assert_adds_up(peak)
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.static_bytes == measured.static_bytes


@pytest.mark.parametrize("method", ["hydra", "lora"])
def test_simulated_and_measured_peaks_agree_in_ppo(method):
    sizes = workload(microbatch=2, score_batch=2, reward_heads=5, reward_loss="advantage")
    simulated, measured = both(sizes, method, "ppo")
    for phase, peak in measured.phases.items():
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated.static_bytes == measured.static_bytes


def test_each_head_is_a_row_of_numbers():
    """128 numbers in fp32 each: four more members, and the expected reward."""
    plain, several = (
        capture(workload(**changes), simulate=True, config=CONFIGS["llama"])
        for changes in ({}, {"reward_heads": 5, "reward_loss": "advantage"})
    )
    assert several.static_bytes - plain.static_bytes == (4 + 1) * 128 * 4
