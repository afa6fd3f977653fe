"""Sampling and scoring: the cached decode equals the uncached pass, whatever a row's neighbours are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import Passes, collect_experience, score
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.rollout.scoring import answer_states
from tests.families import FAMILIES, PROMPTS, randomise

CLOSE = 2e-5
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**changes) -> RolloutSettings:
    return RolloutSettings(**({"batch_size": 3, "max_new_tokens": 12, "temperature": 0.8} | changes))


def build(family: str = "llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    return model


def logprobs_by_pass(model, prompts, responses, temperature, role="actor"):
    batch = Experience.from_lists(prompts, responses, 0, CPU)
    with torch.no_grad(), model.role(role):
        logprobs = model.logprobs(batch.sequences(), temperature).logprobs
    return [row[:n].tolist() for row, n in zip(logprobs, batch.response_lengths, strict=True)]


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_a_pass_without_cache(family, role):
    model = build(family)
    # Ends that come early and at different times, so that rows leave the batch.
    out = sample(model, PROMPTS * 2, settings(), eos_ids=list(range(2, 20)), generator=generator(), role=role)
    assert len({len(r) for r in out.responses}) > 1
    expected = logprobs_by_pass(model, PROMPTS * 2, out.responses, 0.8, role)
    for found, wanted in zip(out.logprobs, expected, strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_sampled_logprobs_on_a_quantised_base(quantization):
    model = build(quantization=quantization)
    out = sample(model, PROMPTS, settings(), [2], generator())
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, PROMPTS, out.responses, 0.8), strict=True):
        # int8 quantises activations row by row too: a wider tolerance there is the kernel's, not the cache's.
        assert found == pytest.approx(wanted, abs=CLOSE if quantization == "nf4" else 2e-2)


def test_responses_stop_at_the_end_token_or_the_limit():
    model = build()
    ends = list(range(2, 30))
    out = sample(model, PROMPTS, settings(), ends, generator())
    for response in out.responses:
        assert all(token not in ends for token in response[:-1])
        assert response[-1] in ends or len(response) == 12


def test_top_k_1_takes_the_most_likely_token_and_keeps_the_unmodified_logprob():
    model = build()
    out = sample(model, PROMPTS, settings(top_k=1), [2], generator())
    again = sample(model, PROMPTS, settings(top_k=1), [2], generator(7))
    assert out.responses == again.responses
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, PROMPTS, out.responses, 0.8), strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)


def test_top_p_leaves_out_the_tail():
    model = build()
    batch = Experience.from_lists(PROMPTS, [[3]] * 3, 0, CPU)
    with torch.no_grad(), model.role("actor"):
        hidden = model.hidden_states(batch.sequences().input_ids)
    for row, prompt in enumerate(PROMPTS):
        p = model.architecture.lm_head().logits(hidden[row, len(prompt) - 1], 0.8).softmax(-1)
        order = p.argsort(descending=True)
        allowed = set(order[: int((p[order].cumsum(0) < 0.3).sum()) + 1].tolist())
        for seed in range(20):
            out = sample(model, [prompt], settings(top_p=0.3, max_new_tokens=1), [2], generator(seed))
            assert out.responses[0][0] in allowed


def test_sampling_follows_the_distribution():
    model = build()
    count = 4000
    out = sample(model, [PROMPTS[0]] * count, settings(max_new_tokens=1), [2], generator())
    with torch.no_grad(), model.role("actor"):
        hidden = model.hidden_states(torch.tensor([PROMPTS[0]]))[0, -1]
    p = model.architecture.lm_head().logits(hidden, 0.8).softmax(-1)
    found = torch.bincount(torch.tensor([r[0] for r in out.responses]), minlength=len(p)) / count
    # Standard error of a share is at most sqrt(p (1 - p) / n); five of them everywhere.
    assert ((found - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-4).all()


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_same_greedy_responses_however_prompts_are_batched(batch):
    model = build("mistral")
    out = sample(model, PROMPTS, settings(top_k=1, generation_batch_size=batch), [2], generator())
    alone = [sample(model, [p], settings(top_k=1), [2], generator()).responses[0] for p in PROMPTS]
    assert out.responses == alone


@pytest.mark.parametrize("family", [f for f in ("llama", "mistral", "gemma3", "gpt2", "opt") if f in FAMILIES])
def test_padding_never_changes_a_number(family):
    model = build(family)
    responses = [[31, 32, 33, 2], [41, 42, 43, 44, 45, 46], [51]]
    together = Experience.from_lists(PROMPTS, responses, 0, CPU).sequences()
    with torch.no_grad():
        ref, scores = model.reference_and_reward(together)
        with model.role("critic"):
            values = model.values(together)
        for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
            alone = Experience.from_lists([prompt], [response], 0, CPU).sequences()
            ref_alone, score_alone = model.reference_and_reward(alone)
            torch.testing.assert_close(ref[row, : len(response)], ref_alone[0], rtol=CLOSE, atol=CLOSE)
            torch.testing.assert_close(scores[row], score_alone[0], rtol=CLOSE, atol=CLOSE)
            with model.role("critic"):
                torch.testing.assert_close(values[row, : len(response)], model.values(alone)[0], rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_at_step_0_actor_is_reference_and_critic_is_reward_to_the_last_bit(quantization):
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES["llama"], quantization=quantization)
    with torch.no_grad():
        for head in ("value", "reward"):
            model.heads[head].weight.copy_(torch.linspace(-1, 1, 64)[None])
    batch = collect_experience(model, PROMPTS, settings(recompute_logprobs=True), eos_ids=[2], pad_id=0, generator=generator())
    assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    with torch.no_grad():
        sequences = batch.sequences()
        with model.role("reward"):
            rewards = model.values(sequences)
        with model.role("critic"):
            assert torch.equal(model.values(sequences), rewards)
            assert torch.equal(model.scores(sequences), model.reference_and_reward(sequences)[1])


def test_collect_experience_fills_every_role_and_announces_phases():
    model = build()
    phases = []
    batch = collect_experience(
        model, PROMPTS, settings(score_batch_size=2), eos_ids=[2], pad_id=0, generator=generator(), on_phase=phases.append
    )
    assert phases == ["rollout", "score"]
    sequences = batch.sequences()
    mask = batch.response_mask
    with torch.no_grad():
        ref, scores = model.reference_and_reward(sequences, 0.8)
        with model.role("critic"):
            values = model.values(sequences)
    torch.testing.assert_close(batch.ref_logprobs[mask], ref[mask], rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(batch.old_values[mask], values[mask], rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(batch.scores, scores, rtol=CLOSE, atol=CLOSE)
    assert (batch.old_values[~mask] == 0).all()


def test_recomputed_logprobs_are_kept_beside_the_samplers():
    model = build()
    batch = collect_experience(model, PROMPTS, settings(recompute_logprobs=True), eos_ids=[2], pad_id=0, generator=generator())
    torch.testing.assert_close(batch.sampler_logprobs, batch.old_logprobs, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("own_adapter", [False, True])
@pytest.mark.parametrize("trunk", [0, 1])
def test_states_that_scores_are_read_from_cost_no_pass(own_adapter, trunk):
    """Of the reward role, also where it has an adapter of its own; everything else keeps its bits."""
    model = build(trunk_layers=trunk)
    if own_adapter:
        model.roles["reward"] = replace(model.roles["reward"], adapter="critic")
    responses = [[31, 32, 33, 2], [41, 42, 43, 44, 45, 46], [51]]
    experience = Experience.from_lists(PROMPTS, responses, 0, CPU)
    logprobs, chosen = torch.zeros(3, 6), settings(score_batch_size=2)
    passes = []
    hook = model.architecture.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    plain = score(model, experience, logprobs, chosen, [2])
    count = len(passes)
    found = score(model, experience, logprobs, chosen, [2], passes=Passes(states=True))
    hook.remove()
    assert len(passes) == 2 * count
    assert plain.features is None
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(found.ref_logprobs, plain.ref_logprobs)
    with torch.no_grad():
        torch.testing.assert_close(model.heads["reward"](found.features)[:, 0], found.scores, rtol=CLOSE, atol=CLOSE)
        ends, means = answer_states(model, PROMPTS, responses, [2], pad_id=0, rows=2, means=True)
    torch.testing.assert_close(ends, found.features, rtol=CLOSE, atol=CLOSE)
    assert means is not None
    torch.testing.assert_close(means[2], ends[2], rtol=CLOSE, atol=CLOSE)  # an answer of one token
    picked = found.select([2, 0])
    assert torch.equal(picked.features, found.features[[2, 0]])
    values = torch.zeros(3, 6)
    assert found.finished(values, values).features is None
