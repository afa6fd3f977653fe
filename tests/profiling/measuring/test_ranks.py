"""What one of several processes holds: simulated by one, and measured in real ones of gloo."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.parallel import world as parallel
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.record import GATHERED
from hydra_ppo.profiling.measuring.recording import Scale
from hydra_ppo.profiling.measuring.shallow import Step
from hydra_ppo.profiling.workload import Workload
from tests.ranks import together
from tests.training import llama

CONFIG = llama(num_hidden_layers=4, hidden_size=128, intermediate_size=256, max_position_embeddings=128)
SIZES = {"dtype": "fp32", "rank": 4, "prompt": 24, "response": 24, "rollout_batch": 8, "microbatch": 2, "score_batch": 2}
BUCKET = 4096
"""Numbers that are summed at once here, so that these do not outweigh a tiny model."""


def profile(workload, world=parallel.ALONE):
    before, parallel.BUCKET = parallel.BUCKET, BUCKET
    try:
        return capture(workload, simulate=world.size == 1, device="cpu", config=CONFIG, timeline=False, world=world)
    finally:
        parallel.BUCKET = before


def peaks(found):
    return {phase: peak.bytes for phase, peak in found.phases.items()}


def measured(world, workload):
    """The lower of two, by phase: gloo's threads hold a piece of a layer a moment longer now and then (one run of eight)."""
    one, other = (peaks(profile(workload, world)) for _ in range(2))
    return {phase: min(size, other[phase]) for phase, size in one.items()}


HELD = [("nf4", True), *(pytest.param(*held, marks=pytest.mark.long) for held in [(None, True), ("nf4", False)])]


@pytest.mark.parametrize(("quantization", "shard"), HELD)
def test_simulated_and_measured_peaks_agree_on_every_rank(quantization, shard):
    workload = Workload("unused", quantization=quantization, world=2, shard_base=shard, **SIZES)
    simulated = profile(workload)
    for found in together(measured, workload, timeout=100.0):
        for phase in ("rollout", "score", "update-actor", "update-critic", "optimizer"):
            assert found[phase] == pytest.approx(simulated.phases[phase].bytes, rel=1e-3), phase
    assert (GATHERED in simulated.phases["score"].kinds) == shard


def test_a_part_of_the_base_and_one_whole_layer_by_hand():
    """Four layers in fp32, shared out over four: three quarters leave, and while a layer runs it is there whole."""
    alone = profile(Workload("unused", **SIZES))
    shared = Workload("unused", world=4, shard_base=True, **SIZES)
    found = profile(shared)
    attention, mlp, norms = 4 * 128 * 128, 3 * 128 * 256, 2 * 128
    layer = 4 * (attention + mlp + norms)
    assert alone.static_bytes - found.static_bytes == 3 * layer
    assert layer <= found.phases["score"].kinds[GATHERED] <= 2 * layer


def test_two_shallow_models_predict_a_deep_one_that_is_shared_out():
    workload = Workload("unused", quantization="nf4", world=2, shard_base=True, **SIZES)
    deep = llama(num_hidden_layers=7, hidden_size=128, intermediate_size=256, max_position_embeddings=128)
    whole = capture(workload, simulate=True, config=deep, timeline=False).phases
    predicted = Step(workload, deep, (2,)).phases(7, Scale(4, 2, 4))
    for phase in ("rollout", "score", "update-actor", "update-critic"):
        assert predicted[phase] == pytest.approx(whole[phase].bytes, rel=2e-3), phase


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"world": 3}, "rollout_batch=8 is not a multiple of world=3"),
        ({"shard_base": True}, "world=1 has nobody to share the base out with"),
        ({"shard_base": True, "world": 2, "quantization": "int8"}, "quantization='int8' cannot be shared out"),
        ({"shard_base": True, "world": 2, "tile_tokens": 8}, "tile_tokens=8 makes unequal numbers of passes"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        replace(Workload("unused", **SIZES), **changes)
