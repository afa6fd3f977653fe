"""What only a GPU can show: bf16 and 4-bit kernels, the allocator's own peaks, fp16 loss scaling, sampling on CUDA."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from hydra_ppo.config.settings import RewardSettings, RewardSource, RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.record import PHASES
from hydra_ppo.profiling.measuring.shallow import with_depth
from hydra_ppo.profiling.subjects.shapes import model_config
from hydra_ppo.profiling.validate.roles import BF16_TOLERANCES, check_roles, make_batch, randomise
from hydra_ppo.profiling.validate.run import SMALL
from hydra_ppo.profiling.validate.speed import free, weights_made_on
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.training.ppo import PPOTrainer
from tests.training import llama, ppo_config, prompts, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]

DEVICE = torch.device("cuda")

AGREEMENT = 0.1
"""Largest relative difference between a simulated peak and the allocator's, which counts cuBLAS's workspaces too."""

DRIFT = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference in nats between a log-prob from the KV cache and from a whole pass."""

LOW_WORDS = RewardSettings(sources=[RewardSource("function", "tests.training:count_low_tokens")])


@pytest.fixture(autouse=True)
def _memory_of_its_own():
    yield
    free(DEVICE)


def needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")


def build(**options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(LlamaConfig(**SMALL), device=str(DEVICE), **options)
    randomise(model)
    return model


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_roles_equal_separate_models(quantization):
    """With and without checkpointing."""
    if quantization:
        needs_bitsandbytes()
    found = check_roles(LlamaConfig(**SMALL), quantization, DEVICE, tokens=128)
    for run in ("checkpointing_off", "checkpointing_on"):
        for name, limit in BF16_TOLERANCES.items():
            assert found[run][name] <= limit, f"{run} {name}"


def test_checkpointing_changes_no_gradient():
    model = build(dtype="bf16")
    batch = make_batch(SMALL["vocab_size"], 64, DEVICE).sequences()
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.enable_checkpointing(checkpointing)
        model.zero_grad()
        with model.role("actor"):
            logprobs = model.logprobs(batch).logprobs
        with model.role("critic"):
            values = model.values(batch)
        (logprobs.sum() + values.sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        apart = (gradients[1][name] - gradient).norm() / gradient.norm()
        assert apart <= BF16_TOLERANCES["worst_gradient"], name


def test_no_tensor_of_batch_by_tokens_by_vocabulary():
    vocabulary, rows, tokens = 128256, 8, 512
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = HydraModel.from_config(config, dtype="bf16", device=str(DEVICE))
    model.train()
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Experience.from_lists([[5]] * rows, ids, 0, DEVICE).sequences()
    before = free(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with model.role("actor"):
        model.logprobs(batch).logprobs.sum().backward()
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    assert peak < rows * tokens * vocabulary  # a byte an entry: half of what they take in bf16, a quarter of fp32


def test_nf4_roles_survive_switches_between_training_and_evaluation():
    needs_bitsandbytes()
    model = build(quantization="nf4", dtype="bf16")
    model.enable_checkpointing()
    batch = make_batch(SMALL["vocab_size"], 32, DEVICE).sequences()

    @torch.no_grad()
    def numbers() -> list[torch.Tensor]:
        found = list(model.reference_and_reward(batch))
        with model.role("actor"):
            found += model.logprobs(batch)
        with model.role("critic"):
            return [*found, model.values(batch)]

    model.eval()
    first = numbers()
    for _ in range(2):
        model.train()
        with model.role("actor"):
            model.logprobs(batch).logprobs.sum().backward()
        with model.role("critic"):
            model.values(batch).sum().backward()
        for found, expected in zip(numbers(), first, strict=True):
            assert torch.equal(found, expected)
        model.eval()
        for found, expected in zip(numbers(), first, strict=True):
            assert torch.equal(found, expected)
    gradients = [p.grad for role in ("actor", "critic") for p in model.role_parameters(role).values()]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def trainer(memory: str = "never", **options) -> PPOTrainer:
    torch.manual_seed(0)
    model = HydraModel.from_config(llama(), device=str(DEVICE), **options)
    config = ppo_config(reward=LOW_WORDS)
    return PPOTrainer(model, tokenizer(), replace(config, run=replace(config.run, memory=memory)), prompts())


def test_fp16_with_a_scaled_loss_stays_finite():
    ppo = trainer(dtype="fp16")
    assert ppo.progress.scaler.is_enabled()
    before = {name: p.clone() for name, p in ppo.model.role_parameters("actor").items()}
    for step in range(1, 4):
        metrics = ppo.step(step)
    # A norm of an update that the scaler left out may be infinite; nothing else may.
    assert all(math.isfinite(value) for name, value in metrics.items() if value is not None and "grad_norm" not in name)
    assert ppo.progress.scaler.get_scale() >= 1
    after = ppo.model.role_parameters("actor")
    assert all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(p, before[name]) for name, p in after.items())


def test_phases_have_their_peaks():
    ppo = trainer(memory="auto", dtype="bf16")
    with ppo.memory.step(0):
        ppo.step(1)
    held = sum(p.numel() * p.element_size() for p in ppo.model.parameters())
    assert set(ppo.memory.peaks) == set(PHASES) - {"load"}
    assert all(peak > held for peak in ppo.memory.peaks.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampled_logprobs_equal_scored_ones(dtype):
    model = build(dtype=dtype)
    rows = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23, 24, 25, 26, 27]]
    settings = RolloutSettings(batch_size=3, max_new_tokens=24, temperature=0.8)
    samples = sample(model, rows, settings, [0], torch.Generator(DEVICE).manual_seed(0))
    experience = Experience.from_lists(rows, samples.responses, 0, DEVICE)
    with model.role("actor"), torch.no_grad():
        scored = model.logprobs(experience.sequences(), settings.temperature).logprobs
    for row, sampled in enumerate(samples.logprobs):
        expected = torch.tensor(sampled, device=DEVICE)
        assert (scored[row, : len(sampled)] - expected).abs().max() <= DRIFT[dtype]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_is_refused_with_one_line_where_it_is_missing():
    with pytest.raises(ConfigError, match="flash_attention_2' but the package flash-attn is not installed") as error:
        HydraModel.from_config(llama(), attention="flash_attention_2", dtype="bf16", device=str(DEVICE))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_simulated_peaks_are_those_of_the_allocator(quantization):
    needs_bitsandbytes()
    config = with_depth(model_config("llama-3.2-1b"), 8)
    config.tie_word_embeddings = False  # large enough that cuBLAS's workspaces do not decide
    workload = Workload("llama-3.2-1b", quantization=quantization, prompt=256, response=32, rollout_batch=4)
    simulated = capture(workload, simulate=True, config=config, timeline=False)
    free(DEVICE)
    with weights_made_on(DEVICE):
        measured = capture(workload, simulate=False, device=str(DEVICE), config=config, timeline=False)
    assert set(measured.allocator) == set(PHASES)
    for phase in PHASES[1:]:
        allocated = measured.allocator[phase]["max_memory_allocated"]
        assert simulated.phases[phase].bytes == pytest.approx(allocated, rel=AGREEMENT), phase
