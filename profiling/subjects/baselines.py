"""The methods that Hydra is compared with, each behind the interface that the trainer speaks.

========= ===== ========= ==================================================
method    bases LoRA sets reference and reward
========= ===== ========= ==================================================
full      4     0         frozen models of their own
lora      4     2         frozen models of their own
dlora     2     2         the actor's base and the critic's, LoRA off
j-hydra   1     1         the base, LoRA off, one pass; actor and critic share a LoRA set
hydra     1     2         the base, LoRA off, one pass
========= ===== ========= ==================================================

Source: Santacroce et al. 2023 (arXiv 2309.00754), table 1. Note: the joint update of J-Hydra's shared adapter is done in two
passes here, the actor's and the critic's, as for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from hydra_ppo.compute.logprobs import TokenLogprobs
from hydra_ppo.errors import ConfigError, RoleError
from hydra_ppo.experience import Sequences
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.quantized_embeddings import QuantizedHead
from hydra_ppo.model.roles import Role, Stage

ACTOR, CRITIC = Role("actor", "lm"), Role("critic", "value")
REFERENCE, REWARD = Role(None, "lm"), Role(None, "reward")

STAGES: dict[str, list[Stage]] = {
    "full": [
        Stage("ppo", {"actor": Role(None, "lm")}, ("actor",), tunes_base=True),
        Stage("ppo", {"critic": Role(None, "value")}, ("critic",), tunes_base=True),
        Stage("ppo", {"reference": REFERENCE}, ()),
        Stage("ppo", {"reward": REWARD}, ()),
    ],
    "lora": [
        Stage("ppo", {"actor": ACTOR}, ("actor",)),
        Stage("ppo", {"critic": CRITIC}, ("critic",)),
        Stage("ppo", {"reference": REFERENCE}, ()),
        Stage("ppo", {"reward": REWARD}, ()),
    ],
    "dlora": [
        Stage("ppo", {"actor": ACTOR, "reference": REFERENCE}, ("actor",)),
        Stage("ppo", {"critic": CRITIC, "reward": REWARD}, ("critic",)),
    ],
    "j-hydra": [
        Stage(
            "ppo",
            {"actor": ACTOR, "critic": Role("actor", "value"), "reference": REFERENCE, "reward": REWARD},
            ("actor", "critic"),
        )
    ],
    "hydra": [
        Stage("ppo", {"actor": ACTOR, "critic": CRITIC, "reference": REFERENCE, "reward": REWARD}, ("actor", "critic")),
    ],
}
"""For each method the models that it holds, as tables of roles."""

METHODS = tuple(STAGES)


def build(method: str, load: Callable[[Stage], HydraModel]) -> HydraModel | SeparateModels:
    """Build the models of a method.

    Args:
        method: one of `METHODS`.
        load: makes a HydraModel at the given stage; called once per base, each time for a base of its own.

    Raises:
        ConfigError: when there is no such method.
    """
    if method not in STAGES:
        raise ConfigError(f"methods={method!r} is unknown; choose among {', '.join(METHODS)}.")
    models = []
    for stage in STAGES[method]:
        model = load(stage)
        if all(role.head != "lm" for role in stage.roles.values()):
            drop_lm_head(model)
        models.append(model)
    return models[0] if len(models) == 1 else SeparateModels(models)


@torch.no_grad()
def drop_lm_head(model: HydraModel) -> None:
    """Free the causal head of a model that is only ever a critic or a reward model, as a sequence classifier has none.

    A head that is tied to the input embeddings costs nothing and stays.
    """
    head = model.architecture.output_embeddings
    if isinstance(head, QuantizedHead):
        if head.weight is not model.architecture.input_embeddings.weight:
            head.drop()
        return
    if head.weight is not model.causal_lm.get_input_embeddings().weight:
        trained = head.weight.requires_grad
        head.weight = nn.Parameter(head.weight.new_empty(0, head.weight.shape[1]), requires_grad=trained)


class SeparateModels(nn.Module):
    """Several models that together have the four roles; outside of any role it is the actor's.

    Args:
        models: each with roles that no other has.

    Memory: every base once; that is what it is for.
    """

    def __init__(self, models: list[HydraModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self._homes: dict[str, HydraModel] = {name: model for model in models for name in model.roles}
        self._current = self._homes["actor"]

    # -- what a HydraModel at stage ppo has ------------------------------------------------------------------------------

    @property
    def train_stage(self) -> str:
        """Always `ppo`."""
        return "ppo"

    @property
    def trainable_roles(self) -> tuple[str, ...]:
        """Roles that receive gradients, of all models."""
        return tuple(role for model in dict.fromkeys(self._homes.values()) for role in model.trainable_roles)

    @property
    def reward_head_trained(self) -> bool:
        return self._homes["reward"].reward_head_trained

    @property
    def reward_heads(self) -> int:
        return self._homes["reward"].reward_heads

    @property
    def current_role(self) -> str | None:
        """Name of the role in force; None outside of all roles."""
        return self._current.current_role

    def __getattr__(self, name: str) -> Any:
        """Answer everything else (architecture, device, hidden_states, ...) as the model of the current role does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self._current, name)

    @contextmanager
    def role(self, name: str) -> Iterator[Self]:
        """Be one role inside the block."""
        if name not in self._homes:
            raise RoleError(f"role={name!r} does not exist; choose among {', '.join(self._homes)}.")
        before = self._current
        self._current = self._homes[name]
        try:
            with self._current.role(name):
                yield self
        finally:
            self._current = before

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return what training `role` changes."""
        return self._homes[role].role_parameters(role)

    def bound_values(self, bounds: Sequence[float] | None) -> None:
        """Keep the critic's values within two bounds."""
        self._homes["critic"].bound_values(bounds)

    def enable_checkpointing(self, enabled: bool = True, offload: bool | None = None) -> None:
        """Switch activation checkpointing in every model."""
        for model in self.models:
            model.enable_checkpointing(enabled, offload=offload)

    def logprobs(self, sequences: Sequences, temperature: float = 1.0, entropy_grad: bool = False) -> TokenLogprobs:
        """Compute log-probs and entropy of the response tokens in the current role."""
        return self._current.logprobs(sequences, temperature, entropy_grad)

    def values(self, sequences: Sequences) -> Tensor:
        """Return (B, R) values in the current role."""
        return self._current.values(sequences)

    def reference_and_reward(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Compute reference log-probs (B, R) and scores (B,): two passes, as they are two models."""
        with self.role("reference"):
            ref_logprobs = self.logprobs(sequences, temperature).logprobs
        with self.role("reward"):
            return ref_logprobs, self._current.scores(sequences)

    def reference_and_members(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what `reference_and_reward` does, and what each member of the reward head says, (B, k)."""
        with self.role("reference"):
            ref_logprobs = self.logprobs(sequences, temperature).logprobs
        with self.role("reward"):
            found = self._current.readings(sequences)
        members = found.members if found.expected is None else found.members - found.expected[:, None]
        return ref_logprobs, members.mean(dim=1), members
