"""Loading holds no more than what it ends in, and a simulation says so too."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hydra_ppo.compat import NAMES_WHAT_IS_MISSING
from hydra_ppo.model.loading import load_base
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.profiling.subjects.fake import fake_base, fake_tensors

BOUND = 0.05
"""How much more than the loaded base may be held while it is loaded; and how far simulation and measurement may be apart."""
SIZES = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 20, "num_attention_heads": 4}
OPTIONS = {"attention": "sdpa", "dtype": "bf16", "device": "cpu", "trust_remote_code": False}

pytestmark = pytest.mark.skipif(not NAMES_WHAT_IS_MISSING, reason="a simulation needs transformers 5")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def stored(request, tmp_path_factory):
    """A folder of several shards, and its config."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(**SIZES, tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="3MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, config


def peak_and_end(make) -> tuple[int, int]:
    """Return the most bytes that were alive while a base was made, and those that are left."""
    gc.collect()
    with Tracker() as tracker:
        base = make()
        gc.collect()
        end = tracker.bytes
    assert base is not None
    return tracker.peaks()["load"].bytes, end


@pytest.mark.parametrize("quantization", ["nf4", "int8", None])
def test_loading_holds_what_it_ends_in_and_is_simulated_so(quantization, stored, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads do is seen by no dispatch mode
    folder, config = stored
    measured, end = peak_and_end(lambda: load_base(str(folder), quantization=quantization, **OPTIONS))
    weights = sum(p.numel() for n, p in AutoModelForCausalLM.from_config(config).named_parameters() if "proj" not in n) * 2
    assert end > weights  # all of it was seen
    assert measured <= (1 + BOUND) * end
    with fake_tensors():
        simulated, simulated_end = peak_and_end(lambda: fake_base(config, quantization, torch.bfloat16))
    assert simulated_end == pytest.approx(end, rel=0.002)
    assert simulated <= (1 + BOUND) * simulated_end
    assert abs(simulated - measured) <= BOUND * end


def test_of_a_stored_quantised_base_too(stored, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    load_base(str(stored[0]), quantization="nf4", **OPTIONS).save_pretrained(tmp_path)
    measured, end = peak_and_end(lambda: load_base(str(tmp_path), quantization=None, **OPTIONS))
    assert measured <= (1 + BOUND) * end


def test_a_base_that_is_quantised_when_all_of_it_is_there_is_far_above(stored):
    """What the bound is there to find."""
    from hydra_ppo.model.loading import base_from_config

    peak, end = peak_and_end(
        lambda: base_from_config(stored[1], quantization="nf4", attention="sdpa", dtype="bf16", device="cpu")
    )
    assert peak > 1.5 * end
