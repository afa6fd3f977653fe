"""Lean decoding: the numbers of the model's own modules, and none of it where something else has a say in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from hydra_ppo.compute.bases import base_of
from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.compute.products import SMALL
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import RoleError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout import decoder, lean_decoding
from hydra_ppo.rollout.lean_decoding import LeanBackbone, supports
from hydra_ppo.rollout.sampling import Samples, sample
from tests.families import COMMON, FAMILIES, PROMPTS, randomise
from tests.hydra_ppo.rollout.test_collect import CLOSE, build, generator, settings

LEAN = [name for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3") if name in FAMILIES]
OTHERS = sorted(set(FAMILIES) - set(LEAN))
EQUAL_LENGTHS = [[5, 6, 7], [11, 12, 13], [21, 22, 23], [31, 32, 33]]
ENDS = list(range(2, 12))
BF16_CLOSE = 0.1
"""Log-probs in bf16, nats: a logit of 8 has steps of 2^-5, and sums are taken in another order."""

pytestmark = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")


def made(config, **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(config, **options)
    randomise(model)
    return model


@contextmanager
def uses(monkeypatch) -> Iterator[list[type]]:
    """Collect what decoded each batch: LeanBackbone or NoneType."""
    found: list[type] = []
    plain = decoder._lean_backbone

    def watched(*args):
        lean = plain(*args)
        found.append(type(lean))
        return lean

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_lean_backbone", watched)
        yield found


def by_modules(monkeypatch, model: HydraModel, prompts, role: str, steps: int = 12) -> Samples:
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_lean_backbone", lambda *_: None)
        return sample(model, prompts, settings(max_new_tokens=steps), ENDS, generator(), role)


def check_same(monkeypatch, model: HydraModel, close: float = 2e-6, role: str = "actor") -> None:
    for prompts in (PROMPTS * 2, EQUAL_LENGTHS):
        with uses(monkeypatch) as used:
            found = sample(model, prompts, settings(), ENDS, generator(), role)
        assert set(used) == {LeanBackbone}
        wanted = by_modules(monkeypatch, model, prompts, role)
        if close <= CLOSE:
            assert found.responses == wanted.responses
        for mine, theirs, left, right in zip(found.logprobs, wanted.logprobs, found.responses, wanted.responses, strict=True):
            if left == right:
                assert mine == pytest.approx(theirs, abs=close)


@pytest.mark.parametrize("short", [0, lean_decoding.SHORT], ids=["kernel", "products"])
@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("family", LEAN)
def test_numbers_are_those_of_the_modules(family, role, short, monkeypatch):
    monkeypatch.setattr(lean_decoding, "SHORT", short)
    check_same(monkeypatch, build(family), role=role)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True), {}),
        (LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}), {}),
        (LlamaConfig(**COMMON | {"num_key_value_heads": 4}, hidden_act="gelu"), {}),
        (LlamaConfig(**COMMON), {"trunk_layers": 2}),
        (LlamaConfig(**COMMON), {"lora": LoraSettings(r=3, alpha=7, target_modules=["q_proj", "v_proj", "down_proj"])}),
        (LlamaConfig(**COMMON), {"quantization": "nf4"}),
        # Full attention in one layer and a window of 5 in the others.
        (Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1), {}),
    ],
    ids=["biases", "scaled-rope", "gelu", "trunk", "few-adapters", "nf4", "two-kinds-of-layers"],
)
def test_numbers_are_those_of_the_modules_with(config, options, monkeypatch):
    model = made(config, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, std=0.1)
    check_same(monkeypatch, model)


def test_numbers_in_bf16_are_those_of_the_modules_but_for_rounding(monkeypatch):
    check_same(monkeypatch, build(dtype="bf16"), close=BF16_CLOSE)


def test_checkpointing_changes_nothing(monkeypatch):
    model = build()
    model.enable_checkpointing()
    check_same(monkeypatch, model)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_through_their_modules(family):
    assert not supports(build(family))


def _hook(model: HydraModel) -> None:
    model.architecture.layers[1].mlp.register_forward_hook(lambda *_: None)


def _pre_hook(model: HydraModel) -> None:
    model.architecture.layers[0].register_forward_pre_hook(lambda *_: None)


def _hook_on_a_linear(model: HydraModel) -> None:
    model.architecture.layers[1].self_attn.o_proj.get_base_layer().register_forward_hook(lambda *_: None)


def _other_norm(model: HydraModel) -> None:
    norm = model.architecture.layers[2].post_attention_layernorm
    norm.forward = lambda x: 2 * x


def _other_layer(model: HydraModel) -> None:
    layer = model.architecture.layers[2]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


def _other_linear(model: HydraModel) -> None:
    projection = model.architecture.layers[2].self_attn.q_proj
    projection.forward = lambda x: type(projection).forward(projection, x)


@pytest.mark.parametrize("change", [_hook, _pre_hook, _hook_on_a_linear, _other_norm, _other_layer, _other_linear])
def test_what_is_put_into_the_base_is_run(change):
    model = build(trunk_layers=1)
    assert supports(model)
    change(model)
    assert not supports(model)


def test_autocast_goes_through_the_modules():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports(model)
    assert supports(model)


def test_a_trunk_that_is_taken_goes_through_the_modules():
    model = build(trunk_layers=1)
    with model.taking_trunk():
        assert not supports(model)
    assert supports(model)


def test_merged_adapters_are_refused():
    """They would be in the base, in every role."""
    model = build()
    with model.role("actor"):
        for module in model.architecture.layers.modules():
            if hasattr(module, "merge"):
                module.merge()
        with pytest.raises(RoleError, match="adapter 'actor' is merged into the base"):
            sample(model, PROMPTS, settings(), ENDS, generator())
        for module in model.architecture.layers.modules():
            if hasattr(module, "unmerge"):
                module.unmerge()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_of_few_rows_are_the_products(rows, bias):
    layer = torch.nn.Linear(512, SMALL // 512, bias=bias)  # large enough for the other kernel at any number of rows
    x = torch.randn(rows, 512)
    with torch.no_grad():
        found = base_of(layer).product_of_few(x)
        assert found.shape == (rows, SMALL // 512)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
