"""What each way to keep an optimizer's moments holds, on the device and the host: simulated as measured, and by hand."""

from __future__ import annotations

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.training.offloaded import BUCKET_BYTES
from tests.profiling.measuring.test_capture import AGREEMENT, assert_adds_up
from tests.profiling.models import CONFIGS, workload

SAVINGS = {
    "8 bit": {"optimizer": "adamw-8bit"},
    "offloaded": {"optimizer": "adamw-offloaded"},
    "in turn": {"update_order": "in-turn"},
    "away": {"offload_in_rollout": True},
    "8 bit, away, in turn": {"optimizer": "adamw-8bit", "offload_in_rollout": True, "update_order": "in-turn"},
    "offloaded, in turn": {"optimizer": "adamw-offloaded", "update_order": "in-turn"},
}


@pytest.mark.parametrize("saving", SAVINGS)
def test_simulated_and_measured_peaks_agree_for_each_way_to_keep_moments(saving):
    """Rank 32: matrices of 4096 and more numbers, and smaller ones, which 8-bit moments leave in fp32."""
    sizes = workload(rank=32, rollout_batch=6, microbatch=2, score_batch=2, **SAVINGS[saving])
    simulated = capture(sizes, simulate=True, config=CONFIGS["llama"])
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS["llama"])
    assert simulated.phases.keys() == measured.phases.keys()
    for phase, peak in measured.phases.items():
        assert_adds_up(peak)
        assert_adds_up(simulated.phases[phase])
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
        for kind in ("gradients", "optimizer"):
            assert phase == "load" or simulated.phases[phase].kinds.get(kind, 0) == peak.kinds.get(kind, 0), (phase, kind)
    assert simulated.floor_bytes == measured.floor_bytes
    assert simulated.host_bytes == measured.host_bytes
    assert (measured.host_bytes > 0) == (saving not in ("8 bit", "in turn"))


def test_what_each_way_to_keep_moments_holds_by_hand():
    """Rank 32, per layer and adapter: q 128+128, k and v 128+64, o 128+128, gate and up 128+384, down 384+128."""
    lora = 32 * 4 * (2 * 256 + 2 * 192 + 3 * 512)
    actor, critic = lora, lora + 128
    small = 2 * 4 * 2 * 32 * 64 + 128  # the outer matrices of k and v, 32 x 64 each, and the value head keep fp32 moments
    large = actor + critic - small
    steps = 4 * (2 * 4 * 7 * 2 + 1)
    moments = {
        "adamw": 8 * (actor + critic) + steps,
        "adamw-offloaded": steps,
        # two bytes a number, two scales for 256 of them, two tables; counts of steps are no tensors
        "adamw-8bit": 2 * large + 8 * small + 2 * 4 * large // 256 + 2048,
    }
    found = {}
    for name in moments:
        for order in ("together", "in-turn"):
            profile = capture(workload(rank=32, optimizer=name, update_order=order), simulate=True, config=CONFIGS["llama"])
            gradients = 4 * (actor + critic if order == "together" else critic)
            assert profile.floor_bytes == profile.static_bytes + gradients + moments[name], (name, order)
            kinds = profile.phases["update-critic"].kinds
            assert kinds["optimizer"] == pytest.approx(moments[name], abs=64)  # the actor's norm, where it was before
            assert kinds["gradients"] == gradients
            assert profile.host_bytes == (8 * (actor + critic) if name == "adamw-offloaded" else 0)
            found[name, order] = profile
    away = capture(workload(rank=32, offload_in_rollout=True), simulate=True, config=CONFIGS["llama"])
    padding = 12 * (2 * 4 * 7 * 2 + 1)  # what brings a count of steps up to 16 bytes
    assert away.floor_bytes == found["adamw", "together"].floor_bytes + padding
    assert away.host_bytes == moments["adamw"] + padding
    for phase in ("rollout", "score"):
        assert "optimizer" not in away.phases[phase].kinds
        assert away.phases[phase].bytes == found["adamw", "together"].phases[phase].bytes - moments["adamw"]


def test_a_step_with_offloaded_moments_takes_two_rooms():
    found = capture(workload(rank=32, optimizer="adamw-offloaded"), simulate=True, config=CONFIGS["llama"])
    rooms = found.phases["optimizer"].kinds["optimizer"] - found.phases["update-actor"].kinds["optimizer"]
    assert rooms == pytest.approx(2 * BUCKET_BYTES, abs=4096)  # and the norms of a clip


def test_pages_are_the_host_s():
    """A simulation stands in for CUDA's: matrices of 100,000 numbers and more are paged, the others are on the device."""
    paged, plain = (
        capture(workload(rank=300, optimizer=name), simulate=True, config=CONFIGS["llama"])
        for name in ("paged-adamw-8bit", "adamw-8bit")
    )
    assert paged.host_bytes == 2 * 2 * 4 * 3 * 300 * 384  # two moments, two adapters, four layers, gate, up and down
    assert plain.host_bytes == 0
    assert plain.floor_bytes - paged.floor_bytes == paged.host_bytes
    with pytest.raises(ConfigError, match=r"^optimizer.name='paged-adamw-8bit' needs CUDA"):
        capture(workload(optimizer="paged-adamw-8bit"), simulate=False, device="cpu", config=CONFIGS["llama"])


def test_a_reward_model_with_8_bit_moments():
    sizes = workload(rank=32, optimizer="adamw-8bit")
    simulated = capture(sizes, "lora", simulate=True, stage="reward", config=CONFIGS["llama"])
    measured = capture(sizes, "lora", simulate=False, device="cpu", stage="reward", config=CONFIGS["llama"])
    for phase, peak in measured.phases.items():
        assert simulated.phases[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    plain = capture(workload(rank=32), "lora", simulate=True, stage="reward", config=CONFIGS["llama"])
    assert simulated.floor_bytes < plain.floor_bytes


@pytest.mark.parametrize(
    ("changes", "method", "stage", "message"),
    [
        ({"update_order": "in-turn"}, "j-hydra", "ppo", "update_order='in-turn' steps .* 'j-hydra' share an adapter; leave"),
        ({"update_order": "in-turn"}, "lora", "reward", "update_order='in-turn' has nothing to do in stage='reward'; leave"),
        ({"offload_in_rollout": True}, "full", "reward", "offload_in_rollout=True has nothing to do in stage='reward'; leave"),
    ],
)
def test_settings_that_a_method_or_stage_cannot_have(changes, method, stage, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        capture(workload(**changes), method, simulate=True, stage=stage, config=CONFIGS["llama"])
    with pytest.raises(ConfigError, match=r"^offload_in_rollout=True has nothing to do with optimizer='adamw-offloaded'"):
        workload(optimizer="adamw-offloaded", offload_in_rollout=True)
