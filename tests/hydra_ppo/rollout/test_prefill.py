"""Prompts that go over the cache in pieces leave what one pass over them leaves."""

from __future__ import annotations

import logging

import pytest
import torch

from hydra_ppo.compat import MASKS_BY_LAYER_TYPE
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.rollout.plain_decoders import ModelCacheDecoder, RecomputingDecoder
from hydra_ppo.rollout.sampling import sample
from tests.families import FAMILIES, randomise

CLOSE = 1e-5
PROMPTS = [[5 + (3 * i + row) % 80 for i in range(length)] for row, length in enumerate((23, 9, 17))]

in_pieces = pytest.mark.skipif(not MASKS_BY_LAYER_TYPE, reason="this transformers takes prompts in one go, and says so")


def build(family: str, tile: int | None, **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    model.tile_tokens = tile  # of the prefill alone: layers are run whole
    return model


def sampled(model: HydraModel, prompts=PROMPTS, **options):
    settings = RolloutSettings(max_new_tokens=6, top_k=1)
    return sample(model, prompts, settings, [], torch.Generator().manual_seed(0), **options)


@in_pieces
@pytest.mark.parametrize("tile", [12, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logprobs_are_those_of_one_pass(family, tile):
    """Rows of different lengths; windows of 5 columns in some families; pieces of 4 columns, and of one."""
    plain, pieces = sampled(build(family, None)), sampled(build(family, tile))
    assert pieces.responses == plain.responses
    for found, expected in zip(pieces.logprobs, plain.logprobs, strict=True):
        assert found == pytest.approx(expected, abs=CLOSE)


@in_pieces
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_whatever_the_attention(attention):
    plain, pieces = (sampled(build("mistral", tile, attention=attention)) for tile in (None, 12))
    assert pieces.responses == plain.responses


@in_pieces
def test_passes_are_as_long_as_a_piece(monkeypatch):
    model, widths = build("llama", 12, check="off"), []
    plain = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, **options: widths.append(tuple(ids.shape)) or plain(ids, **options))
    sampled(model)
    assert [shape for shape in widths if shape[1] > 1] == [(3, 4)] * 5 + [(3, 3)]


@in_pieces
def test_above_a_trunk():
    plain, pieces = (sampled(build("llama", tile, trunk_layers=1)) for tile in (None, 12))
    assert pieces.responses == plain.responses


@in_pieces
def test_nothing_is_as_long_as_the_prompt_in_both_directions():
    """An eager attention's scores show it: (56, 56) in one go, 8 x columns in pieces."""
    squares = []
    for tile in (None, 8):
        model = build("llama", tile, attention="eager", check="off")
        with Tracker() as tracker:
            sampled(model, [[5 + i % 80 for i in range(56)]])
        squares.append(any(s.shape[-2:] == (56, 56) for s in tracker.storages))
        assert any(s.shape == (1, 4, 8, 56) for s in tracker.storages) == (tile == 8)
    assert squares == [True, False]


@pytest.mark.parametrize("decoder", [ModelCacheDecoder, RecomputingDecoder])
def test_decoders_that_take_prompts_in_one_go_say_so_once(decoder, caplog):
    model = build("llama", 12)
    with caplog.at_level(logging.WARNING, logger="hydra_ppo"):
        for _ in range(2):
            found = sampled(model, decoder=decoder, lengths=[6, 6, 6])
    assert [record.getMessage() for record in caplog.records if "tile_tokens=12" in record.getMessage()] == [
        "model.tile_tokens=12: prompts are run in one go, as this model's decoder does"
    ]
    assert found.responses == sampled(build("llama", None), lengths=[6, 6, 6]).responses
