"""Embedding and head can be taken on their way into a model, and nothing else of it is another for that."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.model import arriving
from hydra_ppo.model.arriving import Arrivals
from hydra_ppo.model.loading import load_base
from hydra_ppo.model.quantized_embeddings import embeddings_kind, quantize_embeddings
from hydra_ppo.model.whole import skeleton
from tests.families import FAMILIES
from tests.held import held
from tests.hydra_ppo.model.test_whole import BASE, narrow, save
from tests.training import llama

TIED = ["llama", "llama-tied", "gemma3", "gpt2", "opt", "gpt-neox"]


def load(folder, take, **options):
    """Load a base with an `Arrivals`; return both."""
    made = []
    original = Arrivals.after

    def after(self, model):
        made.append(self)
        original(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrivals, "after", after)
        model = load_base(str(folder), **BASE | options, take=take)
    return model, made[0]


@pytest.mark.parametrize("late", [False, True], ids=["while it loads", "afterwards"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("family", [name for name in TIED if name in FAMILIES])
def test_both_are_taken_and_the_rest_is_as_ever(family, quantization, late, tmp_path, monkeypatch):
    folder = save(tmp_path / "base", FAMILIES[family])
    plain = load_base(str(folder), **BASE | {"quantization": quantization})
    if late:
        monkeypatch.setattr(arriving, "import_module", lambda name: None)  # as of transformers 4
    model, arrivals = load(folder, lambda name, weight: weight.clone(), quantization=quantization)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == FAMILIES[family].tie_word_embeddings
    assert len(arrivals.made) == (1 if embedding is head else 2)
    assert torch.equal(arrivals.made_of(embedding), plain.get_input_embeddings().weight)
    assert torch.equal(arrivals.made_of(head), plain.get_output_embeddings().weight)
    taken = {name for name, p in model.named_parameters(remove_duplicate=False) if p is embedding or p is head}
    assert {p.untyped_storage().nbytes() for p in (embedding, head)} == {embedding.element_size()}
    before, after = held(plain), held(model)
    assert before.keys() == after.keys()
    for name in before.keys() - taken:
        same = torch.equal(before[name], after[name]) if isinstance(before[name], torch.Tensor) else before[name] == after[name]
        assert same, name
    assert all(after[name].shape == before[name].shape for name in taken if name in before)


def test_what_nobody_takes_is_put_where_it_belongs(tmp_path):
    folder = save(tmp_path / "base", llama())
    model, arrivals = load(folder, lambda name, weight: None)
    plain = load_base(str(folder), **BASE)
    assert arrivals.made_of(model.lm_head.weight) is None
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_what_is_offered_is_in_the_compute_type(tmp_path):
    save(tmp_path / "base", llama())
    load_base(str(tmp_path / "base"), **BASE | {"quantization": "nf4"}).save_pretrained(tmp_path / "stored")
    for folder in ("base", "stored"):
        _, arrivals = load(tmp_path / folder, lambda name, weight: weight.dtype, dtype="bf16")
        assert arrivals.made == dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), torch.bfloat16), folder


def test_one_that_is_not_taken_can_go_beside_one_that_is(tmp_path):
    folder = save(tmp_path / "base", llama())
    model, arrivals = load(folder, lambda name, weight: weight.sum() if name == "lm_head.weight" else None)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(arrivals.made_of(model.lm_head.weight), plain.lm_head.weight.sum())


def test_a_weight_of_another_shape_is_not_offered(tmp_path):
    def shorter(tensors):
        return {k: v[:20].contiguous() if "embed_tokens" in k else v for k, v in narrow(tensors).items()}

    folder = save(tmp_path / "base", llama(), shorter)
    with pytest.raises(ConfigError, match="another shape"):
        load(folder, lambda name, weight: pytest.fail(name) if "embed" in name else None)


def test_every_weight_is_seen(tmp_path):
    folder = save(tmp_path / "base", llama())
    seen: list[str] = []
    load_base(str(folder), **BASE, see=lambda model, name: seen.append(name))
    assert sorted(seen) == sorted(name for name, _ in skeleton(str(folder)).named_parameters())


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "opt"])
def test_quantised_as_they_arrive_they_are_as_if_quantised_afterwards(family, kind, quantization, tmp_path):
    if family not in FAMILIES:
        pytest.skip("transformers does not know it yet")
    folder = str(save(tmp_path / "base", FAMILIES[family]))
    later = load_base(folder, **BASE | {"quantization": quantization})
    quantize_embeddings(later, kind)
    model = load_base(folder, **BASE | {"quantization": quantization, "quantized_embeddings": kind})
    assert embeddings_kind(model) == kind
    ours, theirs = model.get_input_embeddings(), later.get_input_embeddings()
    assert ours.scale == theirs.scale
    for one, other in ((ours.rows, theirs.rows), (model.get_output_embeddings().rows, later.get_output_embeddings().rows)):
        assert one.dtype == other.dtype
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.scales, other.scales)
    assert (ours.rows is model.get_output_embeddings().rows) == FAMILIES[family].tie_word_embeddings
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, later(ids).logits)


def test_a_broken_embedding_and_a_strange_kind_are_refused(tmp_path, monkeypatch):
    def broken(tensors):
        tensors["model.embed_tokens.weight"][3, 3] = float("nan")
        return tensors

    folder = str(save(tmp_path / "base", llama(), broken))
    with pytest.raises(UnsupportedModelError, match="holds numbers that are NaN or infinite; get the model again"):
        load_base(folder, **BASE, quantized_embeddings="int8")
    monkeypatch.setattr("hydra_ppo.model.loading.load_whole", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"model\.quantize_embeddings='int5' is unknown; choose int8, nf4 or null"):
        load_base(folder, **BASE, quantized_embeddings="int5")
