"""What a rollout on servers is measured by, in numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from hydra_ppo.config.settings import RewardSettings, RewardSource, RolloutSettings, VLLMSettings
from hydra_ppo.experience import Experience, ScoredExperience
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.training.ppo import PPOTrainer
from hydra_ppo.training.ppo_metrics import rollout_metrics
from tests.training import hydra, ppo_config, prompts, tokenizer


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


LOW_WORDS = RewardSettings(isolation="thread", sources=[RewardSource("function", "tests.training:count_low_tokens")])


def elsewhere(model, rows, settings, *arguments, **options):
    """Sample as a server does that computes log-probs a little otherwise."""
    plain = replace(settings, engine="native", vllm=VLLMSettings())
    found = sample(model, rows, plain, *arguments, **options)
    return Samples(found.responses, [[p - 0.4 * (i % 3) for i, p in enumerate(row)] for row in found.logprobs])


def trained(**rollout):
    model = hydra()
    settings = RolloutSettings(batch_size=8, max_new_tokens=6, **rollout)
    trainer = PPOTrainer(model, tokenizer(), ppo_config(rollout=settings, reward=LOW_WORDS), prompts(), sampler=elsewhere)
    metrics = [trainer.step(1), trainer.step(2)]
    return [p.detach().clone() for p in model.role_parameters("actor").values()], metrics


def test_a_run_on_servers_is_one_that_recomputes_and_weighs():
    """The same bits as with the settings that ask for both; without weights the actor becomes another."""
    servers = VLLMSettings(urls=["http://host:1"], importance_cap=1.3)
    actor, metrics = trained(engine="vllm", vllm=servers)
    same, others = trained(recompute_logprobs=True, importance_cap=1.3)
    assert all(torch.equal(one, other) for one, other in zip(actor, same, strict=True))
    assert metrics == others
    assert metrics[0]["rollout/importance_weight"] > 1
    assert metrics[0]["rollout/importance_truncated"] > 0.2
    unweighed, plain = trained(engine="vllm", vllm=replace(servers, importance_cap=None))
    assert any(not torch.equal(one, other) for one, other in zip(actor, unweighed, strict=True))
    assert plain[0]["rollout/drift"] == metrics[0]["rollout/drift"]
