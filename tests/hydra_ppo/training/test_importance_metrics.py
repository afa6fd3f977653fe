"""What a rollout on servers is measured by, in numbers worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch

from hydra_ppo.experience import Experience, ScoredExperience
from hydra_ppo.training.ppo_metrics import rollout_metrics


def scored(old, sampler):
    rows = Experience.from_lists([[1]] * len(old), [[5] * len(row) for row in old], 0, torch.device("cpu"))

    def padded(values):
        width = max(map(len, values))
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in values])

    return ScoredExperience(
        **rows.parts(),
        old_logprobs=padded(old),
        sampler_logprobs=None if sampler is None else padded(sampler),
        ref_logprobs=padded(old),
        old_values=padded(old),
        scores=torch.zeros(len(old)),
    )


def measured(old, sampler, cap):
    return rollout_metrics(scored(old, sampler), [0.0] * len(old), [0.0] * len(old), 0.0, [2], cap)


def test_weights_by_hand():
    """Ratios 2, 1/2 and 1; padding counts nowhere."""
    found = measured([[-1.0, -2.0], [-3.0]], [[-1.0 - log(2), -2.0 + log(2)], [-3.0]], 1.5)
    assert found["rollout/importance_max"] == pytest.approx(2)
    assert found["rollout/importance_weight"] == pytest.approx((1.5 + 0.5 + 1) / 3)
    assert found["rollout/importance_truncated"] == pytest.approx(1 / 3)
    assert found["rollout/drift"] == pytest.approx(2 * log(2) / 3)
    assert found["rollout/drift_max"] == pytest.approx(log(2))
    # r - 1 - log r: 1 - log 2, log 2 - 1/2, 0
    assert found["rollout/sampler_kl"] == pytest.approx(0.5 / 3)


def test_the_kl_is_that_of_two_distributions():
    """Of a sampler that draws by (1/4, 3/4) for a policy of (1/2, 1/2), over as many tokens of each as it draws."""
    sampler, policy = [log(1 / 4)] + [log(3 / 4)] * 3, [log(1 / 2)] * 4
    wanted = (1 / 4) * log((1 / 4) / (1 / 2)) + (3 / 4) * log((3 / 4) / (1 / 2))
    assert measured([policy], [sampler], None)["rollout/sampler_kl"] == pytest.approx(wanted)


def test_nothing_is_measured_where_nothing_was_recomputed():
    found = measured([[-1.0]], None, 2.0)
    assert not {"rollout/sampler_kl", "rollout/importance_max", "rollout/drift"} & found.keys()


def test_without_a_cap_nothing_is_weighed():
    assert "rollout/importance_max" not in measured([[-1.0]], [[-1.1]], None)
