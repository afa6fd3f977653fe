"""A base that is shared out over two processes gives the numbers of a whole one."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model import sharding
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import quantization_of
from hydra_ppo.model.sharding import bytes_here, is_sharded
from tests.families import FAMILIES
from tests.ranks import together
from tests.training import llama, write_model

ROWS = [[0, 1], [2, 3], [4]]
"""Three micro-batches: the second process has one that does not count."""


def data():
    generator = torch.Generator().manual_seed(2)

    def rows(least, most):
        lengths = torch.randint(least, most, (5,), generator=generator).tolist()
        return [torch.randint(3, 32, (length,), generator=generator).tolist() for length in lengths]

    return Experience.from_lists(rows(3, 12), rows(2, 15), 0, torch.device("cpu"))


def fill(model):
    """Give all that is trained numbers, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for role in ("actor", "critic"):
        for parameter in model.role_parameters(role).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    head = model.heads["reward"].weight
    head.data.copy_(torch.randn(head.shape, generator=generator) * 0.1)
    return model


def build(source, shard, **options):
    torch.manual_seed(0)
    shared = {"lora": LoraSettings(r=4, alpha=8), "shard": shard}
    if isinstance(source, str):
        return fill(HydraModel.from_pretrained(source, **shared, **options))
    return fill(HydraModel.from_config(source, **shared, **options))


def passes(model, experience, mine):
    """Go forward and backward in both roles; return what a pass over all rows says of reference and reward."""
    with torch.no_grad():
        reference = model.reference_and_reward(experience.sequences(), 0.7)
    for rows, counts in mine:
        sequences = experience.select(rows).sequences()
        with model.role("actor"):
            logprobs = model.logprobs(sequences, 0.7).logprobs
            ((logprobs * sequences.response_mask * 0.3).sum() * float(counts)).backward()
        with model.role("critic"):
            values = model.values(sequences)
            (((values - 0.5) ** 2 * sequences.response_mask).sum() * float(counts)).backward()
    return reference


def gradients(model):
    return {n: p.grad for role in ("actor", "critic") for n, p in model.role_parameters(role).items()}


def compare(world, source, checkpointing, options):
    """Return how far a shared out base is from a whole one, and the bytes of layers before and here."""
    experience = data()
    whole = build(source, False, **options)
    whole.enable_checkpointing(checkpointing)
    expected = passes(whole, experience, [(rows, True) for rows in ROWS])
    wanted = gradients(whole)
    before = bytes_here(whole.architecture.layers.parameters())
    del whole
    model = build(source, True, **options)
    model.enable_checkpointing(checkpointing)
    assert model.is_sharded
    assert all(is_sharded(layer) for layer in model.architecture.layers)
    kind = quantization_of(model.causal_lm)
    assert kind == options.get("quantization"), kind
    frozen = [p for n, p in model.architecture.layers.named_parameters() if not p.requires_grad and "lora" not in n]
    world.in_step = True
    found = passes(model, experience, world.share(ROWS, len))
    mask = experience.response_mask
    far = [(found[0] - expected[0])[mask].abs().max().item(), (found[1] - expected[1]).abs().max().item()]
    world.sum_gradients([p for role in ("actor", "critic") for p in model.role_parameters(role).values()])
    relative = []
    for name, gradient in gradients(model).items():
        relative.append(((gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)).item())
    return max(far), max(relative), before, bytes_here(frozen)


CASES = {
    "fp32": {},
    "nf4": {"quantization": "nf4"},
    "bf16": {"dtype": "bf16"},
    "nf4, bf16, int8 embeddings": {"quantization": "nf4", "dtype": "bf16", "quantize_embeddings": "int8"},
    "trunk": {"trunk_layers": 1},
    "without packing": {"packing": False},
}


@pytest.mark.parametrize("checkpointing", [pytest.param(True, marks=pytest.mark.long), False])
@pytest.mark.parametrize(
    "case", [case if case in ("fp32", "nf4") else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_gradients_are_those_of_a_whole_base(case, checkpointing):
    config = llama(num_hidden_layers=3)
    for far, relative, _, _ in together(compare, config, checkpointing, CASES[case]):
        assert far < (1e-6 if CASES[case].get("dtype") != "bf16" else 2e-2), far
        assert relative < (1e-6 if CASES[case].get("dtype") != "bf16" else 2e-2), relative


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in ("gpt2", "qwen3-tied", "gemma3", "opt") if name in FAMILIES])
def test_families(family):
    for far, relative, _, _ in together(compare, FAMILIES[family], True, {}):
        assert far < 2e-6
        assert relative < 2e-6


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_folder_is_read_layer_by_layer(tmp_path, quantization):
    """The same numbers as from a whole base: a weight that was made anew would show."""
    folder = str(write_model(tmp_path / "base", num_hidden_layers=3))
    options = {} if quantization is None else {"quantization": quantization}
    for far, relative, _, _ in together(compare, folder, True, options):
        assert far < 1e-6
        assert relative < 1e-6


def load(world, folder):
    """Return how many weights had come each time that a layer was shared out, and how many there are."""
    come, shared = [], []
    see, shard = sharding.Whole.see, sharding.shard_layer
    sharding.Whole.see = lambda self, model, name: (come.append(name), see(self, model, name))
    sharding.shard_layer = lambda layer: (shared.append(len(come)), shard(layer))
    HydraModel.from_pretrained(folder, quantization="nf4", shard=True)
    return shared, len(come)


def test_no_process_ever_holds_the_whole_base(tmp_path):
    """A layer is shared out as soon as its nine weights have come, and the next comes then."""
    folder = str(write_model(tmp_path / "base", num_hidden_layers=3))
    for shared, all_of_them in together(load, folder):
        first, second, third = shared
        assert (second - first, third - second) == (9, 9)
        assert first <= all_of_them - 18


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match=r"model.shard_base=true cannot share out model.quantization='int8'"):
        HydraModel.from_config(llama(), quantization="int8", shard=True)
    with pytest.raises(ConfigError, match="this run trains it; use method='lora'"):
        HydraModel.from_config(llama(), train="base", shard=True)
    with pytest.raises(ConfigError, match="this one is alone; start them with torchrun"):
        HydraModel.from_config(llama(), shard=True)
