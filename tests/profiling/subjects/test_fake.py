"""Fake tensors answer reads, and the decoder that leaps leaves the cache that decoding leaves."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

from hydra_ppo.compute import kv_cache
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.subjects import fake
from hydra_ppo.profiling.subjects.fake import LeapingDecoder, fake_base, fake_tensors, no_repetition
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.sampling import sample
from tests.families import FAMILIES, PROMPTS, experience
from tests.profiling.models import CONFIGS, workload
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


PADDED = [[5, 6, 7], [8], [9, 10]]


def left_behind(
    kind: type[Decoder], prompts: list[list[int]], kv: str = "auto"
) -> tuple[list[int], list[tuple[int, ...]], list[int], list]:
    """Decode with given lengths; return the lengths, and in the end the cache's shapes and what of it each row sees, where."""
    model = hydra()
    with torch.no_grad(), model.role("actor"):
        decoder = kind(model, prompts, max(LENGTHS), kv)
        settings = RolloutSettings(batch_size=3, max_new_tokens=20)
        _, _, lengths = decoder.run(settings, [2], torch.rand(max(LENGTHS), len(prompts), dtype=torch.float64), LENGTHS)
    shapes = [tuple(part.filled.shape) for layer in decoder.cache.layers for part in layer.parts]
    room = [tuple(part._storage.shape) for layer in decoder.cache.layers for part in layer.parts]
    seen = [mask.tolist() for mask in decoder.seen().values()] if decoder.masked else []
    return lengths, shapes + room, decoder.positions.tolist(), seen


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("columns", [64, 5, 4, 3])
@pytest.mark.parametrize("prompts", [PADDED, [[5, 6], [7, 8], [9, 3]]])
def test_leaping_leaves_the_cache_that_decoding_leaves(prompts, columns, kv, monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", columns)
    assert left_behind(LeapingDecoder, prompts, kv) == left_behind(Decoder, prompts, kv)


def test_leaping_decodes_where_the_cache_is_made_anew_for_the_last_time(monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", 8)
    decoded = []

    class Watched(LeapingDecoder):
        def _advance(self, *args):
            step = super()._advance(*args)
            decoded.append(self.cache.get_seq_length())
            return step

    sample(hydra(), [[5, 6, 7]], RolloutSettings(max_new_tokens=30), [2], torch.Generator(), lengths=[26], decoder=Watched)
    # 3 prompt columns and 25 fed tokens; the storage of 24 is full before column 25.
    assert decoded == [25, 28]


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


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("columns", [8, 20])
def test_simulated_sampling_peaks_where_the_cache_grows(columns, kv, monkeypatch):
    """36 columns at most: of storage for 8, 16 and so on up to 35, or for 20 and 35."""
    monkeypatch.setattr(kv_cache, "COLUMNS", columns)
    sizes = workload(prompt=16, response=20, rollout_batch=6, kv_cache=kv)
    simulated = capture(sizes, simulate=True, config=CONFIGS["llama"]).phases["rollout"]
    measured = capture(sizes, simulate=False, device="cpu", config=CONFIGS["llama"]).phases["rollout"]
    assert simulated.bytes == pytest.approx(measured.bytes, rel=0.001)
    assert simulated.kinds["kv cache"] == measured.kinds["kv cache"]
