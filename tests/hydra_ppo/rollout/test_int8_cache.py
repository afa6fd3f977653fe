"""Sampling on a cache in int8: the numbers of plain rounding, in every family and in both ways to decode; refused elsewhere."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen2Config

from hydra_ppo.compute.int8 import dequantise, quantise
from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.compute.kv_int8 import Int8Cache, Int8Tensor, mixer
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.rollout import choice, decoder, lean_decoding
from hydra_ppo.rollout.choice import decoder_of
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.lean_decoding import LeanBackbone
from hydra_ppo.rollout.plain_decoders import ModelCacheDecoder, RecomputingDecoder
from hydra_ppo.rollout.sampling import Samples, sample
from tests.families import COMMON, FAMILIES, PROMPTS
from tests.hydra_ppo.rollout.test_choice import model_of
from tests.hydra_ppo.rollout.test_collect import CLOSE, build, generator, logprobs_by_pass, settings
from tests.hydra_ppo.rollout.test_lean_decoding import BF16_CLOSE, ENDS, EQUAL_LENGTHS, LEAN, made, uses

pytestmark = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")
INT8 = {"kv_cache": "int8"}
NO_END = 98
ONE_STEP = 1e-3
"""What a log-prob may differ by, in nats, where sums in another order took an entry of a key across the middle of two codes."""


def check_alike(found: Samples, wanted: Samples) -> None:
    """Let all rows but one have the same numbers, and that one those of a key that was rounded the other way."""
    assert found.responses == wanted.responses
    away = [max(abs(a - b) for a, b in zip(*rows, strict=True)) for rows in zip(found.logprobs, wanted.logprobs, strict=True)]
    assert sorted(away)[-2] < CLOSE
    assert max(away) < ONE_STEP


class Rounding(DynamicCache):
    """transformers' own cache, with keys and values rounded as they enter: what int8 has to come to."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self.get_seq_length(layer_idx) == 0
        matrix, gain = mixer(key_states.shape[-1], key_states.device)
        keys = dequantise(*quantise(key_states @ matrix)) @ matrix / gain
        kept = super().update(keys, dequantise(*quantise(value_states)), layer_idx)
        return (key_states, value_states) if first else kept

    def keep(self, sources, device):
        self.batch_select_indices(torch.tensor(sources, device=device))


@pytest.mark.parametrize("prompts", [PROMPTS * 2, EQUAL_LENGTHS], ids=["padded", "equal-lengths"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_plain_rounding(family, prompts, monkeypatch):
    model = build(family)
    found = sample(model, prompts, settings(**INT8), ENDS, generator())
    monkeypatch.setattr(decoder, "cache_for", lambda *_: Rounding())
    wanted = sample(model, prompts, settings(**INT8), ENDS, generator())
    check_alike(found, wanted)
    assert len({len(row) for row in found.responses}) > 1  # rows left the batch


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_rounding_and_little_of_it(family):
    """The first token follows from the pass over the prompt, which sees nothing rounded."""
    model = build(family)
    out = sample(model, PROMPTS * 2, settings(**INT8), [NO_END], generator())
    passes = logprobs_by_pass(model, PROMPTS * 2, out.responses, 0.8)
    away = torch.tensor(out.logprobs) - torch.tensor(passes)
    assert away[:, 0].abs().max() < CLOSE
    assert CLOSE < away[:, 1:].abs().max() < 0.1
    assert away.abs().mean() < 0.02


def check_lean(monkeypatch, model, close: float | None = None, role: str = "actor") -> None:
    for prompts in (PROMPTS * 2, EQUAL_LENGTHS):
        with uses(monkeypatch) as used:
            found = sample(model, prompts, settings(**INT8), ENDS, generator(), role)
        assert set(used) == {LeanBackbone}
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_lean_backbone", lambda *_: None)
            wanted = sample(model, prompts, settings(**INT8), ENDS, generator(), role)
        if close is None:
            check_alike(found, wanted)
            continue
        for mine, theirs, left, right in zip(found.logprobs, wanted.logprobs, found.responses, wanted.responses, strict=True):
            if left == right:
                assert mine == pytest.approx(theirs, abs=close)


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("family", LEAN)
def test_lean_decoding_gives_the_numbers_of_the_modules(family, role, monkeypatch):
    check_lean(monkeypatch, build(family), role=role)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**COMMON, attention_bias=True),
        LlamaConfig(**COMMON, head_dim=18),
        LlamaConfig(**COMMON | {"num_key_value_heads": 1}, head_dim=6),
        Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ],
    ids=["biases", "wide-heads", "one-head", "two-kinds-of-layers"],
)
def test_lean_decoding_gives_the_numbers_of_the_modules_with(config, monkeypatch):
    check_lean(monkeypatch, made(config))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lean_decoding_in_half_precision(dtype, monkeypatch):
    check_lean(monkeypatch, build(dtype=dtype), close=BF16_CLOSE)


def test_one_layer_is_dequantised_at_a_time(monkeypatch):
    alive: list[int] = []
    places: list[int] = []
    plain = Int8Tensor.whole

    def whole(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        places.append(1)
        weakref.finalize(found, places.pop)
        alive.append(len(places))
        return found

    monkeypatch.setattr(Int8Tensor, "whole", whole)
    sample(build("gpt2"), PROMPTS, settings(**INT8), [NO_END], generator())
    assert max(alive) == 2  # keys and values of one layer
    assert len(alive) > 2
    alive.clear()
    sample(build("llama"), PROMPTS, settings(**INT8), [NO_END], generator())
    assert alive == []  # by products in fp32: a cast of keys, then one of values


def test_equal_prompts_are_run_once_and_rounded_once():
    """A prompt's columns are repeated as they are held."""
    model = build("llama")
    shared = [PROMPTS[i] for i in (1, 0, 1, 2, 0, 1)]
    found = sample(model, shared, settings(**INT8), ENDS, generator())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_distinct", lambda prompts: (list(prompts), list(range(len(prompts)))))
        wanted = sample(model, shared, settings(**INT8), ENDS, generator())
    check_alike(found, wanted)


# -- where it is refused, and what is said of it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "kind"), [("bloom", ModelCacheDecoder), ("llama4_text", ModelCacheDecoder), ("mamba", RecomputingDecoder)]
)
def test_models_with_another_decoder_are_refused(model_type, kind):
    model = model_of(model_type)
    with pytest.raises(UnsupportedModelError, match=r"^rollout.kv_cache='int8' is a cache that \w+ cannot be sampled") as info:
        sample(model, PROMPTS, settings(**INT8), [NO_END], generator())
    assert "\n" not in str(info.value)
    assert model.kept["decoder"] is kind
    sample(model, PROMPTS, settings(), [NO_END], generator())


def test_a_model_that_fails_on_it_is_refused_in_one_line(monkeypatch):
    def update(self, *args):
        raise AttributeError("'NoneType' object has no attribute 'shape'\nat great length")

    model = build("gpt2")
    with model.role("actor"):
        assert decoder_of(model) is Decoder
    monkeypatch.setattr(Int8Cache, "update", update)
    with pytest.raises(UnsupportedModelError, match=r"does not go with GPT2LMHeadModel \(AttributeError: 'NoneType'") as info:
        sample(model, PROMPTS, settings(**INT8), [NO_END], generator())
    assert "\n" not in str(info.value)


def test_the_trial_is_exact_and_says_how_far_int8_is_away(caplog, monkeypatch):
    model = build()
    tried = []
    plain = choice._away

    def away(*args, **options):
        found = plain(*args, **options)
        tried.append((options, found.max().item()))
        return found

    monkeypatch.setattr(choice, "_away", away)
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        for _ in range(2):
            sample(model, PROMPTS, settings(**INT8), [NO_END], generator())
    assert [options for options, _ in tried] == [{}, INT8]
    assert tried[0][1] < CLOSE < tried[1][1] < 0.1
    said = [record.getMessage() for record in caplog.records if "int8" in record.getMessage()]
    assert len(said) == 1
    assert "log-probs of 15 tokens are" in said[0]
    caplog.clear()
    sample(build(), PROMPTS, settings(), [NO_END], generator())
    assert not [record for record in caplog.records if "int8" in record.getMessage()]


def test_the_kernel_and_the_products_agree(monkeypatch):
    """In fp32 by products, in half precision by attention's own kernel: the same attention over the same codes."""
    rows, heads, groups, columns, width = 3, 2, 2, 9, 8
    cache = Int8Cache(limit=columns)
    keys, values = torch.randn(2, rows, heads, columns, width).unbind(0)
    cache.update(keys, values, 0)
    query = torch.randn(rows, heads * groups, width)
    mask = torch.rand(rows, 1, 1, columns) < 0.7
    mask[..., -1] = True
    found = lean_decoding.attend_int8(query, cache.growing[0], mask, 0.3)
    expanded = [half.whole().repeat_interleave(groups, dim=1) for half in cache.growing[0].held]
    scores = torch.einsum("bhd,bhsd->bhs", query, expanded[0]) * 0.3
    weights = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(dim=-1)
    wanted = torch.einsum("bhs,bhsd->bhd", weights, expanded[1])
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
