"""Which decoder a model gets: the fast one where it is right, else transformers' cache, else none; never wrong log-probs."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch

from hydra_ppo.compute.packing import attention_of
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout import choice, sampling
from hydra_ppo.rollout.choice import decoder_of
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.plain_decoders import ModelCacheDecoder, RecomputingDecoder
from hydra_ppo.rollout.sampling import sample
from tests.families import PROMPTS, randomise
from tests.hydra_ppo.rollout.test_collect import CLOSE, build, logprobs_by_pass
from tests.survey.tiny import tiny_model

NEVER: list[int] = []


def model_of(model_type: str) -> HydraModel:
    model = HydraModel(tiny_model(model_type))
    randomise(model)
    return model


def drawn(model: HydraModel, ends=NEVER, **options):
    settings = RolloutSettings(max_new_tokens=10, temperature=1.0, **options)
    return sample(model, PROMPTS * 2, settings, ends, torch.Generator().manual_seed(0))


def check_exact(model: HydraModel, out) -> None:
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, PROMPTS * 2, out.responses, 1.0), strict=True):
        assert found == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize(
    ("model_type", "decoder"),
    [
        ("qwen3", Decoder),
        ("gpt_oss", Decoder),  # sinks
        ("gemma2", Decoder),  # caps in attention
        ("gptj", Decoder),
        ("granite_swa", Decoder),
        ("bloom", ModelCacheDecoder),
        ("gpt_neo", ModelCacheDecoder),  # a window by another name
        ("llama4_text", ModelCacheDecoder),
        ("qwen3_next", ModelCacheDecoder),
        ("jamba", ModelCacheDecoder),
        ("lfm2", ModelCacheDecoder),
        ("mamba", RecomputingDecoder),
    ],
)
def test_every_model_is_sampled_from_as_it_is(model_type, decoder, caplog):
    model = model_of(model_type)
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        out = drawn(model, generation_batch_size=4)
    assert model.kept["decoder"] is decoder
    check_exact(model, out)
    said = [record.message for record in caplog.records if record.message.startswith("sampling from")]
    assert len(said) == (decoder is not Decoder)  # once


@pytest.mark.parametrize("decoder", [ModelCacheDecoder, RecomputingDecoder])
def test_slower_decoders_draw_what_the_fast_one_draws(decoder):
    model = build()
    ends = list(range(40, 70))
    fast = drawn(model, ends)
    model.kept["decoder"] = decoder
    slow = drawn(model, ends)
    assert slow.responses == fast.responses
    assert {len(row) for row in fast.responses} != {10}  # some ended, at different times
    for mine, theirs in zip(slow.logprobs, fast.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=CLOSE)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa", "gptj", "codegen", "xglm", "gemma2"])
def test_a_wrong_decoding_is_found_without_knowing_the_family(model_type, monkeypatch):
    """Decoding forced through SDPA, which knows no sinks and no caps, and asks its mask where these models add it."""

    @contextmanager
    def always_sdpa(model):
        with attention_of(model.architecture.config, "sdpa"):
            yield

    for module in (choice, sampling):
        monkeypatch.setattr(module, "decoding_attention", always_sdpa)
    model = model_of(model_type)
    try:
        out = drawn(model)
    except UnsupportedModelError as error:
        assert "cannot be sampled from" in str(error)  # noqa: PT017
    else:
        check_exact(model, out)


def test_none_is_right(monkeypatch):
    model = build()
    monkeypatch.setattr(choice, "_difference", lambda *_: (0.7, 0.002))
    with model.role("actor"), pytest.raises(UnsupportedModelError, match=r"differ from those of a whole pass by 0.7 nats"):
        decoder_of(model)


def test_the_choice_is_made_once_and_leaves_random_numbers_alone():
    model = build()
    state = torch.random.get_rng_state()
    with model.role("actor"):
        assert decoder_of(model) is Decoder
    assert torch.equal(torch.random.get_rng_state(), state)
    model.kept["decoder"] = RecomputingDecoder
    with model.role("actor"):
        assert decoder_of(model) is RecomputingDecoder


def test_off_takes_the_fast_one():
    model = HydraModel(tiny_model("gpt_neo"), check="off")
    with model.role("actor"):
        assert decoder_of(model) is Decoder
