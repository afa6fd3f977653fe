"""What two shallow models say of a deep one is what a simulation of the whole depth says, at any rank and for any rows."""

from __future__ import annotations

import pytest

from hydra_ppo.compute import logprobs
from hydra_ppo.profiling.measuring import shallow
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.recording import GROWTHS, HIGH, LOW, Scale, Unlike, _factor, record
from hydra_ppo.profiling.measuring.shallow import Step, depths, simulated_step, trunk_rows, with_depth
from tests.profiling.models import CONFIGS, workload

PREDICTED = 0.002
"""Largest relative difference between a prediction and a simulation of the whole depth."""

MICROS = (1, 2, 4)


def assert_predicts(step: Step, config, scale: Scale, trunk: int = 0, **changes) -> None:
    """Compare every phase but loading with a simulation of all layers."""
    rows = {"rollout_batch": scale.batch, "microbatch": scale.micro, "score_batch": scale.micro}
    predicted = step.phases(config.num_hidden_layers, scale, trunk)
    whole = capture(workload(**changes, **rows, rank=scale.rank, trunk_layers=trunk), simulate=True, config=config)
    assert set(whole.phases) <= set(predicted)
    for phase in set(whole.phases) - {"load"}:
        assert predicted[phase] == pytest.approx(whole.phases[phase].bytes, rel=PREDICTED), (phase, scale)


@pytest.mark.parametrize(
    ("family", "changes", "scales", "trunk"),
    [
        ("llama", {"quantization": "nf4", "dtype": "bf16"}, [Scale(4, 1, 8), Scale(16, 4, 32)], 0),
        ("llama", {}, [Scale(4, 2, 8)], 3),
        ("gpt2", {"checkpointing": False}, [Scale(7, 2, 24)], 0),
        ("qwen3-tied", {"quantization": "int8"}, [Scale(16, 1, 8), Scale(4, 4, 64)], 0),
        ("opt", {"response": 60}, [Scale(8, 1, 16)], 0),
        ("gemma3", {}, [Scale(6, 2, 8)], 0),
    ],
)
def test_shallow_models_predict_a_deep_one(family, changes, scales, trunk):
    config = with_depth(CONFIGS[family], 8 if family == "gemma3" else 7)  # whose layers alternate
    step = simulated_step(workload(**changes), config, MICROS)
    for scale in scales:
        assert_predicts(step, config, scale, trunk, **changes)
    assert step.simulations <= 4  # whatever was asked for


def test_log_probs_in_many_blocks_and_groups_of_rows(monkeypatch):
    """Where the vocabulary is cut does not grow with the rows, so that each number of rows has a peak of its own."""
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 2**17)
    monkeypatch.setattr(logprobs, "NARROWEST", 64)
    config = with_depth(CONFIGS["llama"], 3)
    cuts = {rows: logprobs._cut(12 * rows, 128, 2000, 2**17) for rows in MICROS}
    assert {len(groups) for groups, _ in cuts.values()} == {1}
    assert len({len(blocks) for _, blocks in cuts.values()}) == 3
    step = simulated_step(workload(), config, (*MICROS, 16))
    for micro in (4, 16):
        assert_predicts(step, config, Scale(16, micro, 8))
    assert len(logprobs._cut(12 * 16, 128, 2000, 2**17)[0]) > 1
    assert step.simulations <= 4


def test_what_is_not_in_proportion_is_simulated_for_itself(monkeypatch):
    def unlike(*recordings):
        raise Unlike("on purpose")

    config = with_depth(CONFIGS["llama"], 3)
    monkeypatch.setattr(shallow.Recording, "growths", unlike)
    step = Step(workload(), config, MICROS)
    assert_predicts(step, config, Scale(5, 2, 8))
    first = step.simulations
    step.phases(9, Scale(5, 2, 8))
    assert step.simulations == first
    step.phases(9, Scale(7, 2, 8))
    assert step.simulations == first + 2


def test_another_program_at_another_scale_is_noticed():
    """Gradients of another model are not those of more rows."""
    small = record(workload(), with_depth(CONFIGS["llama"], 1), LOW, ())
    other = record(workload(checkpointing=False), with_depth(CONFIGS["llama"], 1), HIGH, ())
    with pytest.raises(Unlike, match="other allocations"):
        small.growths(other)


def test_each_growth_is_a_factor_of_its_own():
    factors = [_factor(names, HIGH) / _factor(names, LOW) for names in GROWTHS]
    assert len(set(factors)) == len(GROWTHS)


def test_depths_are_those_of_whole_periods():
    types = ["a", "a", "b"]
    assert depths(CONFIGS["llama"]) == (2, 3)
    assert depths(CONFIGS["gemma3"]) == (2, 4)
    config = with_depth(CONFIGS["gemma3"], 7)
    config.layer_types = [types[i % 3] for i in range(7)]
    assert depths(config) == (3, 6)


def test_rows_above_a_trunk():
    scale = Scale(8, 2, 16)
    assert [trunk_rows(phase, scale) for phase in ("rollout", "score", "update-actor", "optimizer")] == [0, 10, 16, 16]
