"""Self-labelling: the filters by hand, rounds on synthetic states, and a round that hurts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hydra_ppo.model.origin import Origin
from hydra_ppo.rewards.head_training import HeadTraining
from hydra_ppo.rewards.self_labels import accepts, choose, self_label

DIM = 10
ORIGIN = Origin(None, None, 2, DIM, None, None, "float32")
TRAINING = HeadTraining("linear", members=3)


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_the_filters_by_hand():
    first = torch.tensor([logit(p) for p in (0.6, 0.4, 0.6, 0.5, 0.95)])
    second = torch.tensor([logit(p) for p in (0.4, 0.6, 0.5, 0.5, 0.6)])
    status, taken, other = choose(first, second)
    assert status == "easy"
    assert taken.tolist() == [True, True, False, False, False]
    assert other.tolist()[:2] == [False, True]
    status, taken, other = choose(first[2:], second[2:])  # none is good against bad; .95 - .6 >= .3
    assert (status, taken.tolist()) == ("hard", [False, False, True])
    assert choose(first[2:4], second[2:4])[0] == "stop"


def test_too_few_are_none():
    """One easy pair of 400 is less than a hundredth."""
    first, second = torch.zeros(400), torch.zeros(400)
    first[0], second[0] = 2.0, -2.0
    assert choose(first, second)[0] == "stop"
    first[:4], second[:4] = 2.0, -2.0
    assert choose(first, second)[0] == "easy"


def test_the_gate_by_hand():
    assert accepts(0.71, 0.74, 0.03)
    assert not accepts(0.70, 0.74, 0.03)


def data(seed: int, count: int, noise: float = 0.5) -> np.ndarray:
    """States (N, 2, H) whose first answer is the better one as Bradley and Terry have it, worth linear in the state."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(count, 2, DIM))
    gap = (states[:, 0] - states[:, 1]) @ np.linspace(-1, 1, DIM)
    swap = rng.random(count) > 1 / (1 + np.exp(-gap / noise))
    states[swap] = states[swap][:, ::-1]
    return states.astype(np.float16)


def parts(labels: int, held: int, count: int) -> tuple[list[int], list[int], list[int]]:
    return list(range(labels)), list(range(labels, labels + held)), list(range(labels + held, count))


@pytest.mark.parametrize("seed", range(3))
def test_it_never_ends_below_its_seed_by_more_than_an_error(seed):
    states = data(seed, 1000)
    states[240:] = states[240:][:, :: 1 if seed % 2 else -1]  # the order of the pool says nothing, so it must not matter
    train, held, pool = parts(40, 200, 1000)
    found = self_label(states, train, held, pool, ORIGIN, TRAINING)
    before, after = found.seed.measured, found.heads.measured
    assert after["accuracy"] >= before["accuracy"] - before["accuracy_se"]
    assert found.rounds[0].kept > 0
    assert len(found.rounds) <= 5
    taken = sum(made.kept for made in found.rounds if made.accepted)
    assert len(found.labels) == taken
    right = [other == (seed % 2 == 0) for _, other in found.labels.values()]
    assert sum(right) >= 0.75 * len(right)  # of none, where the first round is refused
    swapped = sum(other for _, other in found.labels.values())
    assert swapped == sum(made.swapped for made in found.rounds if made.accepted)


def poisoned(seed: int) -> np.ndarray:
    """Labels in which a unit goes with the better answer by accident; in the pool it is what counts, and the truth turned."""
    states = data(seed, 1000).astype(np.float32)
    states[:40, 0, 5] += 3.0
    accident = np.random.default_rng(seed + 100).choice([-8.0, 8.0], size=(760, 2))
    states[240:] -= 0.3 * accident[..., None] * np.linspace(-1, 1, DIM)
    states[240:, :, 5] = accident
    return states.astype(np.float16)


def test_a_round_that_hurts_is_refused():
    for seed in (0, 2):
        train, held, pool = parts(40, 200, 1000)
        said: list[str] = []
        found = self_label(poisoned(seed), train, held, pool, ORIGIN, TRAINING, tell=said.append)
        before, after = found.seed.measured, found.heads.measured
        assert after["accuracy"] >= before["accuracy"] - before["accuracy_se"]
        (only,) = found.rounds
        assert not only.accepted
        assert only.kept > 200
        assert only.accuracy < before["accuracy"] - before["accuracy_se"]
        assert "refused: more than one standard error below" in said[-1]
        assert found.labels == {}
        assert found.heads is found.seed
