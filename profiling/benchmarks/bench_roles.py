"""What it costs to become another role, against PEFT's own `set_adapter`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks.measure import measure

LAYERS, RANK = 8, 16
ROLES = ("actor", "critic")


def make_models(layers: int, rank: int) -> tuple[HydraModel, PeftModel]:
    """Build a small Llama with LoRA on all linear layers, and a copy that is switched as PEFT does it.

    The cost does not depend on the width, only on the number of adapted layers.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = HydraModel.from_config(config, lora=LoraSettings(r=rank, alpha=2 * rank), device="cpu")
    with torch.no_grad():
        for name, parameter in model.base.named_parameters():
            if "lora_B" in name:  # zero in a new adapter, so that all roles would be the same
                parameter.normal_(std=0.1)
    twin = deepcopy(model.base)
    twin.base_model.enable_adapter_layers()
    return model, twin


def by_role(model: HydraModel) -> None:
    """Enter and leave each role."""
    for role in ROLES:
        with model.role(role):
            pass


def by_set_adapter(model: PeftModel) -> None:
    """Make each role's adapter the active one; PEFT has nothing to leave."""
    for role in ROLES:
        model.set_adapter(role)


@torch.no_grad()
def check_agreement(model: HydraModel, twin: PeftModel) -> None:
    """Raise an AssertionError unless both ways give each role the same hidden states, and the roles different ones."""
    ids = torch.arange(8)[None]
    found: list[Tensor] = []
    for role in ROLES:
        with model.role(role):
            found.append(model.hidden_states(ids))
        twin.set_adapter(role)
        assert torch.equal(found[-1], twin.base_model.model.model(ids, use_cache=False).last_hidden_state)
    assert not torch.allclose(*found)


def test_role_switch(benchmark: Any) -> None:
    model, twin = make_models(LAYERS, RANK)
    check_agreement(model, twin)
    calls = {"model.role": lambda: by_role(model), "set_adapter": lambda: by_set_adapter(twin)}
    title = f"actor, then critic, {LAYERS} layers"
    measure(benchmark, title, calls, rounds=20, repeats=50, baseline="set_adapter")
