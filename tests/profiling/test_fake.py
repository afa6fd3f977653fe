"""Fake tensors answer reads, and the decoder that leaps leaves the cache that decoding leaves."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from transformers import LogitsProcessorList

from hydra_ppo.config import RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling import fake
from hydra_ppo.profiling.fake import LeapingDecoder, fake_base, fake_tensors, no_repetition
from hydra_ppo.sampling import Decoder, sample
from tests.families import FAMILIES, PROMPTS, experience
from tests.training import hydra

LENGTHS = [9, 4, 7]


def test_reads_are_answered_with_zeros_of_the_right_shape():
    with fake_tensors():
        tensor = torch.ones(2, 3)
        assert tensor.tolist() == [[0.0] * 3] * 2
        assert torch.arange(2).tolist() == [0, 0]
        assert tensor.sum().item() == 0.0
        assert not bool(tensor[0, 0] > 0)
    assert torch.ones(1).item() == 1.0


def test_a_fake_base_has_the_shapes_of_a_real_one_and_its_ties():
    for family in ("llama", "llama-tied", "gpt2", "opt-projected"):
        with fake_tensors():
            fake = fake_base(FAMILIES[family], None, torch.float32)
            shapes = {name: tuple(p.shape) for name, p in fake.named_parameters()}
        from transformers import AutoModelForCausalLM

        real = AutoModelForCausalLM.from_config(FAMILIES[family])
        assert shapes == {name: tuple(p.shape) for name, p in real.named_parameters()}, family


def cache_shapes(kind: type[Decoder]) -> tuple[list[tuple[int, ...]], list[int], list[list[bool]]]:
    """Decode with given lengths and return the shapes of the cache in the end, the lengths, and the mask of its columns."""
    model = hydra()
    with torch.no_grad(), model.role("actor"):
        decoder = kind(model, [[5, 6, 7], [8], [9, 10]])
        _, _, lengths = decoder.run(
            RolloutSettings(batch_size=3, max_new_tokens=20), LogitsProcessorList(), [2], torch.Generator(), LENGTHS
        )
    return [tuple(layer.keys.shape) for layer in decoder.cache.layers], lengths, decoder.key_mask.tolist()


def test_leaping_leaves_the_cache_that_decoding_leaves():
    assert cache_shapes(LeapingDecoder) == cache_shapes(Decoder)


def test_responses_have_the_lengths_that_were_given():
    for decoder in (Decoder, LeapingDecoder):
        found = sample(
            hydra(), PROMPTS, RolloutSettings(max_new_tokens=20), [2], torch.Generator(), lengths=LENGTHS, decoder=decoder
        )
        assert [len(response) for response in found.responses] == LENGTHS


def test_repetition_is_left_out_only_inside_the_block():
    rows = experience()
    with no_repetition():
        assert len(rows.split(1)) == 1
        assert len(list(rows.minibatches(4, 1, torch.Generator()))) == 1
    assert len(rows.split(1)) == 3
    assert len(list(rows.minibatches(4, 1, torch.Generator()))) == 12


def test_an_old_transformers_is_named(monkeypatch):
    monkeypatch.setattr(fake, "VERSION", Version("4.57.6"))
    with pytest.raises(ConfigError, match=r"transformers==4\.57\.6 cannot be simulated"):
        fake_base(FAMILIES["llama"], None, torch.float32)
