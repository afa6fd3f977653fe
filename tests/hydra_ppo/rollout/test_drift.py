"""What the sampler and a pass say of the same tokens: measured on some rows, and recomputed for all above a bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.rollout import collect
from hydra_ppo.rollout.collect import collect_experience, score
from tests.families import PROMPTS
from tests.hydra_ppo.rollout.test_collect import CLOSE, build, generator, settings

has_layers = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")
ENDS = list(range(2, 14))
ROWS = 7 * PROMPTS  # 21, of which drift is measured on 6


def collected(model, prompts=PROMPTS, **changes):
    rollout = settings(batch_size=len(prompts), score_batch_size=4, **changes)
    return collect_experience(model, prompts, rollout, eos_ids=ENDS, pad_id=0, generator=generator())


@has_layers
@pytest.mark.parametrize("options", [{}, {"trunk_layers": 1}], ids=str)
def test_below_the_bound_the_samplers_logprobs_stay(options):
    model = build(**options)
    found = collected(model, kv_cache="int8", max_drift=1.0)
    passes = collected(model, kv_cache="int8", recompute_logprobs=True)
    assert found.responses() == passes.responses()
    assert found.sampler_logprobs is None
    assert torch.equal(found.old_logprobs, passes.sampler_logprobs)
    row = max(range(len(found)), key=lambda row: found.lengths[row])  # of three a quarter is one
    away = (found.old_logprobs - passes.old_logprobs)[row].abs()[found.response_mask[row]]
    assert found.drift == (pytest.approx(away.mean().item(), rel=1e-4), pytest.approx(away.max().item(), rel=1e-4))
    assert CLOSE < found.drift[0] < 0.02
    assert passes.drift is None


@has_layers
@pytest.mark.parametrize("options", [{}, {"trunk_layers": 1}], ids=str)
def test_above_the_bound_all_rows_are_recomputed_to_the_same_bits(options):
    model = build(**options)
    found = collected(model, ROWS, kv_cache="int8", max_drift=1e-9)
    wanted = collected(model, ROWS, kv_cache="int8", recompute_logprobs=True)
    assert torch.equal(found.old_logprobs, wanted.old_logprobs)
    assert torch.equal(found.sampler_logprobs, wanted.sampler_logprobs)
    assert (found.old_logprobs != found.sampler_logprobs)[found.response_mask].float().mean() > 0.5
    again = collected(model, ROWS, kv_cache="int8", max_drift=1e-9)
    assert torch.equal(found.old_logprobs, again.old_logprobs)
    assert found.drift == again.drift


@has_layers
def test_no_bound_recomputes_nothing():
    found = collected(build(), kv_cache="int8", max_drift=None)
    assert found.sampler_logprobs is None
    assert found.drift[0] > 0


def given_rows(noise: float = 0.0):
    """21 rows of different lengths, and log-probs of theirs that are off by `noise` in the five shortest."""
    model = build()
    lengths = [3 + i for i in range(21)]
    rows = Experience.from_lists([[5, 6]] * 21, [[20 + i] * n for i, n in enumerate(lengths)], 0, torch.device("cpu"))
    right = score(model, rows, torch.zeros(rows.response_ids.shape), RolloutSettings(recompute_logprobs=True)).old_logprobs
    off = right.clone()
    off[:5] += noise
    return model, rows, right, off.masked_fill(~rows.response_mask, 0.0)


@pytest.mark.parametrize("size", [1, 4, 5, 16, 21])
def test_it_is_measured_on_the_longest_quarter_however_many_are_scored_at_once(size):
    model, rows, right, _ = given_rows()
    off = right.clone()
    off[15] += 0.5  # of 18 tokens, the shortest of the six
    off[20, 2] -= 2.0
    rollout = RolloutSettings(score_batch_size=size, measure_drift=True, max_drift=None)
    tokens = sum(range(18, 24))
    found = score(model, rows, off.masked_fill(~rows.response_mask, 0.0), rollout)
    assert found.drift == (pytest.approx((18 * 0.5 + 2.0) / tokens, rel=1e-3), pytest.approx(2.0, rel=1e-3))
    _, _, _, unseen = given_rows(noise=1.0)
    assert score(model, rows, unseen, rollout).drift[1] < CLOSE


def test_only_what_is_measured_is_run_again(monkeypatch):
    model, rows, right, off = given_rows(noise=1.0)
    plain, run = model.logprobs, []

    def logprobs(sequences, *args, **kwargs):
        if model.current_role == "actor":
            run.append(len(sequences.input_ids))
        return plain(sequences, *args, **kwargs)

    monkeypatch.setattr(model, "logprobs", logprobs)
    rollout = RolloutSettings(score_batch_size=8, measure_drift=True)
    off[20] += 1e-3
    found = score(model, rows, off, rollout)
    assert run == [6]
    assert torch.equal(found.old_logprobs, off)
    run.clear()
    score(model, rows, off, replace(rollout, max_drift=1e-12))
    assert run == [6, 2, 8, 5]
    run.clear()
    score(model, rows, off, RolloutSettings(score_batch_size=8))
    assert run == []
    run.clear()
    assert score(model, rows, right, replace(rollout, recompute_logprobs=True)).drift is None
    assert run == [8, 8, 5]


def test_an_exact_cache_drifts_by_rounding_alone():
    found = collected(build(), measure_drift=True)
    assert 0 <= found.drift[0] < CLOSE
    assert found.drift[1] < CLOSE
    assert found.sampler_logprobs is None
    assert collected(build()).drift is None


def test_other_ends_are_recomputed_as_they_are_scored(monkeypatch):
    """Rows that end in another end token are scored as if they ended in the first; their log-probs are not."""
    monkeypatch.setattr(collect, "MEASURED", 1)
    model, rows, right, off = given_rows(noise=1.0)
    off[20] += 1e-3
    ends = [7, *range(20, 41)]  # each row ends in one of its own
    found = score(model, rows, off, RolloutSettings(score_batch_size=4, measure_drift=True, max_drift=1e-12), ends)
    torch.testing.assert_close(found.old_logprobs, right, rtol=CLOSE, atol=CLOSE)
    assert torch.equal(found.sampler_logprobs, off)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"importance_cap": 2.0}, r"^importance_cap=2.0 weighs recomputed log-probs, and none are ever recomputed; set rec"),
        ({"importance_cap": 2.0, "kv_cache": "int8", "max_drift": None}, "none are ever recomputed"),
        ({"importance_cap": 0.5, "recompute_logprobs": True}, "^importance_cap=0.5 must be at least 1"),
        ({"max_drift": 0.0}, "^max_drift=0.0 must be greater than 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(changes, line):
    with pytest.raises(ConfigError, match=line):
        RolloutSettings(**changes)


@pytest.mark.parametrize("changes", [{"recompute_logprobs": True}, {"kv_cache": "int8"}, {"measure_drift": True}])
def test_a_cap_goes_with_whatever_may_recompute(changes):
    assert RolloutSettings(importance_cap=2.0, **changes).importance_cap == 2.0
