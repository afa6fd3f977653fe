"""Decoding with merged copies of the weights: the same policy but for rounding, and the base as it was."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from transformers import Qwen2Config

from hydra_ppo.compute import copied_linear, short_attention
from hydra_ppo.compute.copied_linear import CopiedLinear
from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.rollout import weight_copies
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.rollout.weight_copies import MergedProjections, WeightCopies, merged
from hydra_ppo.runtime.memory import LiveBytes
from tests.families import COMMON, PROMPTS
from tests.hydra_ppo.rollout.test_choice import model_of
from tests.hydra_ppo.rollout.test_collect import build, generator, logprobs_by_pass, settings
from tests.hydra_ppo.rollout.test_lean_decoding import EQUAL_LENGTHS, LEAN, made
from tests.profiling.measuring.test_capture import AGREEMENT, assert_adds_up
from tests.profiling.models import CONFIGS, workload

pytestmark = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")
MERGED = {"weights": "merged-bf16"}
NO_END = 98
needs_order = pytest.mark.skipif(
    not copied_linear.can_be_ordered(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="this processor has no bf16 order"
)


def first_linear(model: HydraModel):
    return model.architecture.layers[0].self_attn.q_proj


def test_what_is_merged_by_hand():
    model = made(Qwen2Config(**COMMON), lora=LoraSettings(r=2, alpha=6))
    layer = first_linear(model)
    with model.role("actor"), torch.no_grad():
        layer.get_base_layer().weight.fill_(1.0)
        layer.lora_A["actor"].weight.copy_(torch.arange(2.0)[:, None].expand_as(layer.lora_A["actor"].weight))
        layer.lora_B["actor"].weight.fill_(0.25)
        # 1 + 6 / 2 * (0.25 * 0 + 0.25 * 1), in bf16 exactly.
        assert merged(layer).dtype is torch.bfloat16
        assert (merged(layer) == 1.75).all()
    with model.role("reference"):
        assert (merged(layer) == 1.0).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_layers_side_by_side_are_each_of_them(monkeypatch, ordered):
    if not ordered:
        monkeypatch.setattr(copied_linear, "_ORDER", None)
    model = made(Qwen2Config(**COMMON))  # whose q, k and v have biases
    attention = model.architecture.layers[1].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(5, COMMON["hidden_size"])
    with model.role("actor"), torch.no_grad():
        for layer in layers:
            layer.get_base_layer().bias.normal_()
        found = MergedProjections(layers, 5)(x)
        for part, layer in zip(found, layers, strict=True):
            expected = layer(x)
            assert part.dtype is torch.float32
            assert (part - expected).abs().max() < 0.02 * expected.abs().max()
            assert not torch.equal(part, expected)


def test_the_head_in_blocks_is_the_head(monkeypatch):
    monkeypatch.setattr(weight_copies, "BLOCK", 7 * 16)  # 7 words at a time of 31
    weight, bias, hidden = torch.randn(31, 16), torch.randn(31), torch.randn(3, 16)
    head = LMHead(weight, bias, softcap=5.0, scale=0.5)
    copies = WeightCopies(3)
    copied = copies.head(head)
    assert len(copied.copies) == 5
    assert (copied.logits(hidden, 0.7) - head.logits(hidden, 0.7)).abs().max() < 0.1
    assert copies.head(LMHead(weight, bias, softcap=5.0, scale=0.5)) is copied


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("family", LEAN)
def test_it_is_the_policy_but_for_rounding(family, role):
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for prompts in (PROMPTS * 2, EQUAL_LENGTHS):
        found = sample(model, prompts, settings(**MERGED), [NO_END], generator(), role)
        passes = logprobs_by_pass(model, prompts, found.responses, 0.8, role)
        away = (torch.tensor(found.logprobs) - torch.tensor(passes)).abs()
        assert 1e-5 < away.mean() < 0.03
        assert away.max() < 0.2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_adapter_is_in_it():
    """Rounding is small beside what the adapter does: the reference's log-probs are elsewhere."""
    model = build("llama")
    found = sample(model, PROMPTS * 2, settings(**MERGED), [NO_END], generator())
    actor, reference = (
        torch.tensor(logprobs_by_pass(model, PROMPTS * 2, found.responses, 0.8, role)) for role in ("actor", "reference")
    )
    sampled = torch.tensor(found.logprobs)
    assert (sampled - actor).abs().mean() < 0.1 * (sampled - reference).abs().mean()


def test_a_base_in_nf4_is_copied_as_it_is_multiplied():
    pytest.importorskip("bitsandbytes")
    model = build("llama", quantization="nf4")
    found = sample(model, PROMPTS, settings(**MERGED), [NO_END], generator())
    away = torch.tensor(found.logprobs) - torch.tensor(logprobs_by_pass(model, PROMPTS, found.responses, 0.8))
    assert away.abs().mean() < 0.03


def test_copies_are_made_once_a_rollout_and_die_with_it(monkeypatch):
    model = build("llama")
    made_of: list[weakref.ref] = []
    plain = CopiedLinear.__init__

    def counted(self, *args):
        made_of.append(weakref.ref(self))
        plain(self, *args)

    sample(model, PROMPTS, settings(**MERGED), [NO_END], generator())  # the trial, once for each model
    monkeypatch.setattr(CopiedLinear, "__init__", counted)
    sample(model, PROMPTS * 2, settings(generation_batch_size=2, **MERGED), [NO_END], generator())
    assert len(made_of) == 4 * len(model.architecture.layers) + 1
    assert not any(ref() for ref in made_of)
    sample(model, PROMPTS, settings(), [NO_END], generator())
    assert len(made_of) == 4 * len(model.architecture.layers) + 1


def test_its_drift_is_said_once(caplog):
    model = build("llama")
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        for _ in range(2):
            sample(model, PROMPTS, settings(**MERGED), [NO_END], generator())
    said = [record.getMessage() for record in caplog.records if "copies of the weights in bf16" in record.getMessage()]
    assert len(said) == 1
    assert "nats from those of a whole pass" in said[0]


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_other_families_are_refused_in_one_line(family):
    model = model_of(family)
    with pytest.raises(UnsupportedModelError, match=r"^rollout.weights='merged-bf16' copies layers that are") as info:
        sample(model, PROMPTS, settings(**MERGED), [NO_END], generator())
    assert "\n" not in str(info.value)
    sample(model, PROMPTS, settings(), [NO_END], generator())


@needs_order
def test_a_tensor_in_an_order_of_its_own_counts_while_it_lives():
    with LiveBytes() as live:
        weight = torch.ones(64, 32, dtype=torch.bfloat16)
        copy = CopiedLinear(weight, None, 4)
        assert copy.ordered
        copy(torch.ones(4, 32))
        assert live.bytes == 2 * weight.nbytes
        del copy
        assert live.bytes == weight.nbytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_by_hand_and_simulated_against_measured(monkeypatch, dtype):
    """Simulated is what a GPU does, without an order; in an order of its own a head in bf16 is copied, too."""
    config = CONFIGS["llama"]
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * width // config.num_attention_heads
    layers = 2 * config.num_hidden_layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    head = 2 * config.vocab_size * width
    sizes = workload(rollout_weights="merged-bf16", prompt=24, response=90, rollout_batch=6, score_batch=2, dtype=dtype)

    def peaks(**how):
        return capture(sizes, config=config, **how).phases

    if copied_linear.can_be_ordered(torch.zeros(2, 2, dtype=torch.bfloat16)):
        assert peaks(simulate=False, device="cpu")["rollout"].kinds["rollout copies"] == layers + head
    monkeypatch.setattr(copied_linear, "_ORDER", None)
    monkeypatch.setattr(short_attention, "LONGEST", 0)  # a GPU has no scores in fp32, 0.3 MiB of this model's updates
    simulated, measured = peaks(simulate=True), peaks(simulate=False, device="cpu")
    for phase, peak in measured.items():
        assert_adds_up(peak)
        assert simulated[phase].bytes == pytest.approx(peak.bytes, rel=AGREEMENT), phase
    assert simulated["rollout"].kinds["rollout copies"] == layers + (head if dtype == "fp32" else 0)
    assert "rollout copies" not in simulated["score"].kinds
