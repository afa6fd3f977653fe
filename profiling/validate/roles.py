"""Whether the roles of one base equal models of their own, in bf16 and on an nf4 base: values and gradients.

In bf16 the separate models are Hugging Face's with PEFT adapters, run as such code runs them: left padding, an attention mask,
full logits, SDPA. On an nf4 base each is a HydraModel of that one role, quantised from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.experience import Experience
from hydra_ppo.model.adapters import adapter_parameters
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import base_from_config
from hydra_ppo.model.roles import Stage

TEMPERATURE = 0.7
LORA = LoraSettings(r=16, alpha=32)

BF16_TOLERANCES = {
    "ref_logprobs": 0.1,
    "logprobs": 0.1,
    "entropy": 0.1,
    "scores": 0.15,
    "values": 0.15,
    "actor_gradient": 0.05,
    "critic_gradient": 0.05,
    "worst_gradient": 0.1,
}
"""Largest absolute difference of values (log-probs and entropy in nats; scores and values have a deviation of about 1), and
norm of the difference of gradients relative to their norm, over a role and for the worst single tensor. bf16 keeps 8 bits, a
relative step of 0.004; these are two to four times what four layers of width 1024 give on a CPU, where Hydra and the separate
models are about equally far from fp32. A recompute in a wrong role gives gradients that are off by more than 1."""


@dataclass(frozen=True)
class Passes:
    """What one forward and backward pass of all four roles gave.

    Attributes:
        values_by_name: ref_logprobs, logprobs, entropy (nats) and values of the N response tokens that count, and scores (B,).
        gradients: by role and parameter.
    """

    values_by_name: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]


def check_roles(config: Any, quantization: Literal["nf4"] | None, device: torch.device, tokens: int) -> dict[str, Any]:
    """Compare the roles with separate models, with and without checkpointing.

    Args:
        config: Hugging Face config of a Llama.
        quantization: of the base.
        device: of all models.
        tokens: longest prompt, and longest response.

    Returns:
        Differences by the names of `BF16_TOLERANCES`, once for each of `checkpointing_off` and `checkpointing_on`; the
        tolerances; `passed`; in bf16 also `rounding`, how far `separate` models and `hydra` each are from fp32.
    """
    hydra = HydraModel(
        _base(config, quantization, device, "auto"), lora=LORA, check="off"
    )  # what is wrong is to be measured here
    randomise(hydra)
    batch = make_batch(config.vocab_size, tokens, device)
    found: dict[str, Any] = {"tolerances": BF16_TOLERANCES}
    if quantization is None:
        expected = separate_passes(hydra, lambda: _base(config, None, device, "sdpa"), batch)
        exact = separate_passes(hydra, lambda: _base(config, None, device, "sdpa").float(), batch)
        found["rounding"] = {
            "separate": differences(expected, exact),
            "hydra": differences(hydra_passes(hydra, batch, checkpointing=False), exact),
        }
    else:
        expected = alone_passes(hydra, lambda: _base(config, quantization, device, "auto"), batch)
    for name, checkpointing in (("checkpointing_off", False), ("checkpointing_on", True)):
        found[name] = differences(hydra_passes(hydra, batch, checkpointing), expected)
    runs = (found["checkpointing_off"], found["checkpointing_on"])
    found["attention"] = hydra.architecture.config._attn_implementation
    found["passed"] = all(run[name] <= limit for run in runs for name, limit in BF16_TOLERANCES.items())
    worst = {name: max(run[name] for run in runs) for name in BF16_TOLERANCES}
    found["summary"] = (
        f"log-probs within {max(worst['ref_logprobs'], worst['logprobs']):.1e} nats, values {worst['values']:.1e}, "
        f"gradients {max(worst['actor_gradient'], worst['critic_gradient']):.1e}"
    )
    return found


def differences(found: Passes, expected: Passes) -> dict[str, float]:
    """Return absolute differences of values and relative ones of gradients, by the names of `BF16_TOLERANCES`."""
    result = {name: (found.values_by_name[name] - value).abs().max().item() for name, value in expected.values_by_name.items()}
    worst = 0.0
    for role, tensors in expected.gradients.items():
        pairs = [(found.gradients[role][name].float(), tensor.float()) for name, tensor in tensors.items()]
        apart = torch.stack([(a - b).norm() for a, b in pairs])
        whole = torch.stack([b.norm() for _, b in pairs])
        result[f"{role}_gradient"] = (apart.norm() / whole.norm()).item()
        worst = max(worst, (apart / whole).max().item())
    return result | {"worst_gradient": worst}


@torch.no_grad()
def randomise(hydra: HydraModel) -> None:
    """Draw adapters that move a layer's output by a fraction of it, and heads whose numbers have a deviation of about 1."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in hydra.named_parameters():
        if "lora_" in name or name.startswith("heads."):
            scale = 0.05 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def make_batch(vocabulary: int, tokens: int, device: torch.device) -> Experience:
    """Draw three rows whose prompts and responses have up to `tokens` tokens each, of different lengths."""
    generator = torch.Generator().manual_seed(2)

    def draw(*lengths: int) -> list[list[int]]:
        return [torch.randint(3, vocabulary, (max(1, n),), generator=generator).tolist() for n in lengths]

    prompts = draw(3 * tokens // 4, tokens // 3, tokens)
    return Experience.from_lists(prompts, draw(tokens // 2, tokens, tokens // 8), 0, device)


def hydra_passes(hydra: HydraModel, batch: Experience, checkpointing: bool) -> Passes:
    """Run the roles of one base: both forward passes first, then one backward, so that a recompute in a wrong role shows."""
    hydra.train()
    hydra.enable_checkpointing(checkpointing)
    hydra.zero_grad()
    sequences = batch.sequences()
    with torch.no_grad():
        ref_logprobs, scores = hydra.reference_and_reward(sequences, TEMPERATURE)
    with hydra.role("actor"):
        logprobs, entropy, _ = hydra.logprobs(sequences, TEMPERATURE, entropy_grad=True)
    with hydra.role("critic"):
        values = hydra.values(sequences)
    trained = {role: hydra.role_parameters(role) for role in hydra.trainable_roles}
    return _backward(batch, ref_logprobs, scores, logprobs, entropy, values, trained)


def alone_passes(hydra: HydraModel, make: Callable[[], PreTrainedModel], batch: Experience) -> Passes:
    """Run four HydraModels of one role each, which hold nothing but that role's adapter and head."""
    models = {}
    for role, spec in hydra.roles.items():
        stage = Stage("ppo", {role: spec}, (role,) if role in hydra.trainable_roles else ())
        models[role] = HydraModel(make(), lora=LORA, train=stage, check="off")
        _copy(hydra.role_parameters(role), models[role].role_parameters(role))
        models[role].train()
    sequences = batch.sequences()
    with models["reference"].role("reference") as model, torch.no_grad():
        ref_logprobs = model.logprobs(sequences, TEMPERATURE).logprobs
    with models["reward"].role("reward") as model, torch.no_grad():
        scores = model.scores(sequences)
    with models["actor"].role("actor") as model:
        logprobs, entropy, _ = model.logprobs(sequences, TEMPERATURE, entropy_grad=True)
    with models["critic"].role("critic") as model:
        values = model.values(sequences)
    trained = {role: models[role].role_parameters(role) for role in hydra.trainable_roles}
    return _backward(batch, ref_logprobs, scores, logprobs, entropy, values, trained)


def separate_passes(hydra: HydraModel, make: Callable[[], PreTrainedModel], batch: Experience) -> Passes:
    """Run four Hugging Face models that share nothing. Memory: full logits (B, T, V), twice."""
    models: dict[str, nn.Module] = {}
    trained: dict[str, dict[str, Tensor]] = {}
    heads = deepcopy(hydra.heads)
    for role, spec in hydra.roles.items():
        models[role] = make().requires_grad_(False)
        if spec.adapter is not None:
            shape = deepcopy(hydra.base.peft_config[spec.adapter])
            models[role] = PeftModel(models[role], shape, adapter_name=spec.adapter)
            mine = adapter_parameters(models[role], spec.adapter)
            _copy(adapter_parameters(hydra.base, spec.adapter), mine)
            trained[role] = {f"{role}.{name}": parameter for name, parameter in mine.items()}
    trained["critic"]["critic.value_head.weight"] = heads["value"].weight
    with torch.no_grad():
        ref_logprobs, _ = _logprobs(_run(models["reference"], batch)[1], batch)
        hidden = _run(models["reward"], batch)[0]
        rows = torch.arange(len(batch), device=hidden.device)
        last = batch.prompt_ids.shape[1] + batch.response_mask.sum(1) - 1
        scores = heads["reward"](hidden[rows, last].float())[:, 0]
    logprobs, entropy = _logprobs(_run(models["actor"], batch)[1], batch)
    states = _run(models["critic"], batch)[0][:, batch.prompt_ids.shape[1] - 1 : -1]  # (B, R, H)
    return _backward(batch, ref_logprobs, scores, logprobs, entropy, heads["value"](states.float())[..., 0], trained)


def _run(model: nn.Module, batch: Experience) -> tuple[Tensor, Tensor]:
    """Return hidden states (B, T, H) and logits (B, T, V) of left-padded rows."""
    mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    seen: list[Tensor] = []
    hook = inner.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits = model(
        input_ids=torch.cat([batch.prompt_ids, batch.response_ids], 1),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    hook.remove()
    return seen[0], logits


def _logprobs(logits: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropy, both (B, R), nats."""
    log_p = torch.log_softmax(logits[:, batch.prompt_ids.shape[1] - 1 : -1].float() / TEMPERATURE, -1)  # (B, R, V)
    return log_p.gather(2, batch.response_ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def _backward(
    batch: Experience,
    ref_logprobs: Tensor,
    scores: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    values: Tensor,
    trained: Mapping[str, Mapping[str, Tensor]],
) -> Passes:
    mask = batch.response_mask
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3)).to(mask.device)
    masked_mean(weights * logprobs + 0.1 * entropy + values**2, mask).backward()
    named = {"ref_logprobs": ref_logprobs, "logprobs": logprobs, "entropy": entropy, "values": values}
    gradients = {role: {n: p.grad.clone() for n, p in parameters.items()} for role, parameters in trained.items()}
    return Passes({name: tensor.detach()[mask] for name, tensor in named.items()} | {"scores": scores}, gradients)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])


def _base(config: Any, quantization: str | None, device: torch.device, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)  # the same weights every time
    with device:
        return base_from_config(config, quantization=quantization, attention=attention, dtype="bf16", device=str(device))
