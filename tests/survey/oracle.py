"""What a HydraModel of any family says and learns, against separate models: plain transformers and PEFT, every row alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.sampling import sample
from tests.families import randomise

PROMPTS = [[5, 6, 7, 8, 9, 60, 61], [11, 12], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32]]
RESPONSES = [[31, 32, 33, 40], [41, 42, 43, 44, 45, 46, 47, 48, 49], [51, 52]]
NEW = 12


class Separate:
    """A base of its own with at most one adapter of PEFT's own."""

    def __init__(self, base: nn.Module, hydra: HydraModel, role: str) -> None:
        self.model: Any = copy.deepcopy(base).eval()
        name = hydra.roles[role].adapter
        if name is not None:
            shape: Any = hydra.base.peft_config[name]
            config = LoraConfig(
                r=shape.r,
                lora_alpha=shape.lora_alpha,
                target_modules=copy.deepcopy(shape.target_modules),
                fan_in_fan_out=shape.fan_in_fan_out,
                layers_to_transform=shape.layers_to_transform,
                layers_pattern=shape.layers_pattern,
            )
            self.model = PeftModel(self.model, config)
            # Not by PEFT's own functions, which rename what they take for experts of older versions.
            theirs = {key.replace(f".{name}.", ".default."): p for key, p in hydra.base.named_parameters() if "lora_" in key}
            with torch.no_grad():
                for key, parameter in self.model.named_parameters():
                    if "lora_" in key:
                        parameter.copy_(theirs[key])

    def logprobs(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Return (R,) log-probs of one row's response."""
        ids = torch.tensor([[*prompt, *response]])
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]

    def all_logprobs(self, responses: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return log-probs of a response to each of `PROMPTS`, row by row."""
        return [self.logprobs(prompt, response) for prompt, response in zip(PROMPTS, responses, strict=True)]

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each adapter parameter, by PEFT's name."""
        return {
            name.replace(".default.", "."): p.grad
            for name, p in self.model.named_parameters()
            if "lora_" in name and p.grad is not None
        }


def largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference; infinite where something is not a number."""
    away = [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(found, expected, strict=True)]
    return max((value if value == value else float("inf") for value in away), default=0.0)


def rows(values: Tensor) -> list[Tensor]:
    """Return the valid part of (B, R) for each of `RESPONSES`."""
    return [row[: len(response)] for row, response in zip(values, RESPONSES, strict=True)]


class Untrainable(Exception):
    """The family cannot be trained by transformers and PEFT alone, so that there is nothing to compare with."""


@dataclass
class Found:
    """What was compared, and how the model was sampled from.

    Attributes:
        differences: by quantity the largest, in nats; of gradients relative to the largest element.
        decoder: class of the decoder that was found right.
    """

    differences: dict[str, float]
    decoder: str

    @property
    def largest(self) -> float:
        return max(self.differences.values())


def compare(make: Callable[[], Any], trunk_layers: int = 0, **options: Any) -> Found:
    """Hold a HydraModel against separate models in values, gradients and sampling.

    Args:
        make: returns the same fresh causal LM each time.
        options: for HydraModel.

    Raises:
        HydraError: where the model is refused.
        Untrainable: where plain transformers fails.
    """
    hydra = HydraModel(make(), trunk_layers=trunk_layers, **options)
    randomise(hydra)
    sequences = Experience.from_lists(PROMPTS, RESPONSES, pad_id=0, device=torch.device("cpu")).sequences()
    plain = {role: Separate(make(), hydra, role) for role in ("reference", "actor")}
    weights = [torch.randn(len(row), generator=torch.Generator().manual_seed(i)) for i, row in enumerate(RESPONSES)]
    try:
        with torch.no_grad():
            reference = plain["reference"].all_logprobs(RESPONSES)
        actor = plain["actor"].all_logprobs(RESPONSES)
        weighted(weights, actor).backward()
    except Exception as error:
        raise Untrainable(str(error).strip().partition("\n")[0]) from error
    found = {}
    with torch.no_grad():
        found["reference"] = largest(rows(hydra.reference_and_reward(sequences)[0]), reference)
    settings = RolloutSettings(max_new_tokens=NEW, temperature=1.0)
    samples = sample(hydra, PROMPTS, settings, [2], torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = plain["actor"].all_logprobs(samples.responses)
    found["sampling"] = largest([torch.tensor(row) for row in samples.logprobs], again)
    theirs = plain["actor"].gradients()
    hydra.train()
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        hydra.zero_grad()
        hydra.enable_checkpointing(checkpointing)
        with hydra.role("actor"):
            logprobs = rows(hydra.logprobs(sequences).logprobs)
        with hydra.role("critic"), torch.no_grad():
            hydra.values(sequences)  # another role's pass, between the actor's own and its gradients
        found["actor"] = largest([row.detach() for row in logprobs], [row.detach() for row in actor])
        weighted(weights, logprobs).backward()
        found[f"gradients, activations {name}"] = _apart(_own_gradients(hydra), theirs)
    return Found(found, hydra.kept["decoder"].__name__)


def weighted(weights: Sequence[Tensor], logprobs: Sequence[Tensor]) -> Tensor:
    """Return a scalar that depends on every log-prob."""
    return torch.stack([(w * row).sum() for w, row in zip(weights, logprobs, strict=True)]).sum()


def _own_gradients(hydra: HydraModel) -> dict[str, Tensor]:
    return {
        key.replace(".actor.", "."): p.grad
        for key, p in hydra.base.named_parameters()
        if "lora_" in key and ".actor." in key and p.grad is not None
    }


def _apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of gradients, relative to the largest element; one that is not there is zeros."""
    scale = max(gradient.abs().max().item() for gradient in theirs.values())
    pairs = []
    for key in ours.keys() | theirs.keys():
        some = ours[key] if key in ours else theirs[key]
        pairs.append((ours.get(key, torch.zeros_like(some)), theirs.get(key, torch.zeros_like(some))))
    return largest(*zip(*pairs, strict=True)) / scale
