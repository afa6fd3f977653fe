"""A model with embeddings in 8 or 4 bits is the plain model whose embeddings are what those stand for, in every role."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import base_from_config
from hydra_ppo.model.quantized_embeddings import QuantizedEmbedding, QuantizedHead, embeddings_kind, quantize_embeddings
from hydra_ppo.rollout.sampling import sample
from tests.families import COMMON, FAMILIES, PROMPTS, randomise, sequences

EXACT = 1e-5
KINDS = ["int8", "nf4"]
NARROW = {"opt-projected"}  # its head is 32 wide


def pair(family: str, kind: str, quantization: str | None = None) -> tuple[HydraModel, HydraModel]:
    """Return a model with quantised embeddings, and one whose plain embeddings are the same numbers."""
    models = []
    for plain in (False, True):
        torch.manual_seed(0)
        base = base_from_config(FAMILIES[family], quantization=quantization, attention="auto", dtype="fp32", device="cpu")
        if plain:
            rounded = models[0].architecture
            base.get_input_embeddings().weight.data.copy_(rounded.input_embeddings.weight[:])
            base.get_output_embeddings().weight.data.copy_(rounded.output_embeddings.weight[:])
        else:
            quantize_embeddings(base, kind)
        models.append(HydraModel(base))
        randomise(models[-1])
    return models[0], models[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NARROW))
def test_every_role_and_its_gradients(family, kind):
    ours, plain = pair(family, kind)
    found, gradients = [], []
    for model in (ours, plain):
        model.enable_checkpointing()
        rows = sequences()
        with torch.no_grad():
            reference = model.reference_and_reward(rows)
        with model.role("critic"):
            values = model.values(rows)
        with model.role("actor"):
            actor = model.logprobs(rows, temperature=0.7, entropy_grad=True)
        mask = rows.response_mask
        loss = (actor.logprobs * mask).sum() + (actor.entropy * mask).sum() + (values * mask).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters))
        found.append([*reference, values.detach() * mask, actor.logprobs.detach() * mask])
    found = [[part if part.ndim == 1 else part * sequences().response_mask for part in parts] for parts in found]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)
    assert len(gradients[0]) == len(gradients[1])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_sampling(family, kind):
    settings = RolloutSettings(max_new_tokens=8)
    found = []
    for model in pair(family, kind):
        generator = torch.Generator().manual_seed(1)
        found.append(sample(model, PROMPTS, settings, [2], generator))
    assert found[0].responses == found[1].responses
    for mine, other in zip(found[0].logprobs, found[1].logprobs, strict=True):
        assert mine == pytest.approx(other, abs=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_4_bit_base(kind):
    ours, plain = pair("llama", kind, quantization="nf4")
    with ours.role("actor"), plain.role("actor"), torch.no_grad():
        mine, other = ours.logprobs(sequences()).logprobs, plain.logprobs(sequences()).logprobs
    torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)


def test_tied_weights_are_one_copy_and_others_two():
    for family, copies in (("llama-tied", 1), ("llama", 2)):
        base = base_from_config(
            FAMILIES[family], quantization=None, attention="auto", dtype="bf16", device="cpu", quantized_embeddings="int8"
        )
        held = {id(m.rows) for m in base.modules() if isinstance(m, QuantizedEmbedding | QuantizedHead)}
        assert len(held) == copies
        assert base.dtype == torch.bfloat16
        numbers = 97 * 64
        buffers = {id(b): b.numel() * b.element_size() for b in base.buffers() if b.dtype == torch.int8}
        assert sum(buffers.values()) == copies * numbers
        assert not any(p.shape == (97, 64) for p in base.parameters())


def test_the_config_that_was_given_stays_as_it_was():
    before = FAMILIES["llama"].to_dict()
    base_from_config(FAMILIES["llama"], quantization=None, attention="auto", dtype="bf16", device="cpu")
    assert FAMILIES["llama"].to_dict() == before


def test_saved_adapters_say_what_they_were_trained_on(tmp_path, caplog):
    base = base_from_config(FAMILIES["llama"], quantization=None, attention="auto", dtype="fp32", device="cpu")
    base.save_pretrained(tmp_path / "base")
    model = HydraModel.from_pretrained(tmp_path / "base", quantize_embeddings="int8")
    assert embeddings_kind(model.causal_lm) == "int8"
    model.save_pretrained(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        again = HydraModel.from_pretrained(tmp_path / "run", quantize_embeddings="int8")
        assert "embeddings" not in caplog.text
        HydraModel.from_pretrained(tmp_path / "run")
    assert "model.quantize_embeddings=int8" in caplog.text
    with model.role("actor"), again.role("actor"), torch.no_grad():
        assert torch.equal(model.logprobs(sequences()).logprobs, again.logprobs(sequences()).logprobs)


def test_what_cannot_be_is_refused():
    base = base_from_config(FAMILIES["llama"], quantization=None, attention="auto", dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="quantize_embeddings='int3' is unknown"):
        quantize_embeddings(base, "int3")
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM has 32"):
        HydraModel.from_config(FAMILIES["opt-projected"], quantize_embeddings="int8")
    narrow = LlamaConfig(**(COMMON | {"hidden_size": 48}))
    with pytest.raises(UnsupportedModelError, match="multiple of 64; LlamaForCausalLM has 48"):
        HydraModel.from_config(narrow, quantize_embeddings="nf4")
    with pytest.raises(ConfigError, match="quantize_embeddings='int8' cannot be trained"):
        HydraModel.from_pretrained("anything", quantize_embeddings="int8", train="base")

    class Bent(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).tanh()

    bent = Bent(97, 64)
    base.set_input_embeddings(bent)
    with pytest.raises(UnsupportedModelError, match="Bent does more than look up rows"):
        quantize_embeddings(base, "int8")
    base.get_output_embeddings().weight.data[3, 3] = float("nan")
    base.set_input_embeddings(nn.Embedding(97, 64))
    with pytest.raises(UnsupportedModelError, match="NaN or infinite"):
        quantize_embeddings(base, "int8")
