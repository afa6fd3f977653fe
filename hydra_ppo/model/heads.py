"""The scalar heads of a base: which there are, what they start as, and what they say of hidden states.

`value` is the critic's and `reward` the reward model's, which may be of several members: k linear heads on one state, of one
pass. Their mean is a linear head itself, and is what everybody reads who wants one score. `expected`, where there is one, says
what reward is to be expected of a prompt; scores are what is above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hydra_ppo.compute.packing import States
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Sequences


class Heads(nn.ModuleDict):
    """The scalar heads by name, each (..., H) -> (..., k) in fp32; k is 1 but for an ensemble of reward heads."""

    def __getitem__(self, name: str) -> nn.Linear:
        return cast(nn.Linear, super().__getitem__(name))


@dataclass(frozen=True)
class HeadPlan:
    """Which scalar heads a model is to have.

    Attributes:
        reward: members of the reward head.
        expected: whether there is a head for the reward that is to be expected of a prompt.
        seed: draws what several members start as.
    """

    reward: int = 1
    expected: bool = False
    seed: int = 0


class Readings(NamedTuple):
    """What the reward heads say of B responses.

    Attributes:
        members: (B, k) r at the last token.
        expected: (B,) e at the last token of the prompt; None where there is no such head.
        along: (B, W, k) r at the columns that were asked for.
    """

    members: Tensor
    expected: Tensor | None = None
    along: Tensor | None = None


def head_plan(config: SFTConfig | PPOConfig) -> HeadPlan | None:
    """Return the heads that a run trains; None where it takes those that there are."""
    if not isinstance(config, SFTConfig) or config.reward_coef == 0:
        return None
    return HeadPlan(config.reward_heads, config.reward_loss == "advantage", config.run.seed)


def saved_plan(manifest: Mapping[str, Any] | None) -> HeadPlan:
    """Return the heads that a saved model has; those of a plain base where there is none."""
    return HeadPlan() if manifest is None else HeadPlan(manifest.get("reward_heads", 1), "expected" in manifest["heads"])


def settled_plan(asked: HeadPlan | None, manifest: Mapping[str, Any] | None) -> HeadPlan:
    """Return the heads of a model that is about to be loaded: as asked for, where saved ones that were trained allow it.

    Raises:
        ConfigError: where the saved model has reward heads that would be lost.
    """
    saved = saved_plan(manifest)
    if asked is None or manifest is None:
        return asked or saved
    if not manifest["reward_head_trained"]:
        return asked  # what it has says nothing
    if asked.reward != saved.reward:
        raise ConfigError(
            f"reward_heads={asked.reward} does not go with a run whose reward model has {saved.reward}; use "
            f"reward_heads={saved.reward}, or start from a base or a run without a trained reward head."
        )
    if saved.expected and not asked.expected:
        raise ConfigError(
            "reward_loss: the run was trained with 'advantage', and another loss would leave its expected rewards behind; use "
            "reward_loss='advantage', or start from a base or a run without a trained reward head."
        )
    return asked


def scalar_heads(hidden_size: int, device: torch.device, plan: HeadPlan | None = None) -> dict[str, nn.Linear]:
    """Return the value and the reward head, and that of the expected reward where it is planned, (..., H) -> (..., k) in fp32.

    All start as zeros but the members of an ensemble, which would be equal for ever: those are drawn from N(0, 1 / (H + 1)), as
    Stiennon et al. 2020 (arXiv 2009.01325), section 3.4, do for one. The same seed gives the same members on every device.

    Memory: H numbers each.
    """
    plan = plan or HeadPlan()
    sizes = {"value": 1, "reward": plan.reward} | ({"expected": 1} if plan.expected else {})
    heads = {name: nn.Linear(hidden_size, size, bias=False, device=device) for name, size in sizes.items()}
    for head in heads.values():
        nn.init.zeros_(head.weight)
    if plan.reward > 1:
        drawn = torch.randn(plan.reward, hidden_size, generator=torch.Generator().manual_seed(plan.seed))
        with torch.no_grad():
            heads["reward"].weight.copy_(drawn / (hidden_size + 1) ** 0.5)
    return heads


def mean_score(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return (...), what a head says of states (..., H): of several members their mean, read by the mean of their weights."""
    if head.out_features == 1:
        found: Tensor = head(hidden.float())
        return found[..., 0]
    return nn.functional.linear(hidden.float(), mean_weight(head.weight))[..., 0]


def mean_weight(weight: Tensor) -> Tensor:
    """Return (1, H), the one linear head that says what k (k, H) say on average."""
    return weight if weight.shape[0] == 1 else weight.mean(dim=0, keepdim=True)


def expected_rewards(heads: Heads, states: States, sequences: Sequences) -> Tensor:
    """Return (B,), the reward that is to be expected of each prompt, read at its last token."""
    return mean_score(heads["expected"], states.at(sequences.prompt_lengths[:, None] - 1))[:, 0]


def read_all(heads: Heads, states: States, sequences: Sequences, columns: Tensor | None = None) -> Readings:
    """Return what training reads of one pass.

    Args:
        states: of the pass in the role `reward`.
        columns: (B, W) of the tokens after which `along` is read.

    Memory: with columns, the states of all tokens in fp32.
    """
    head = heads["reward"]
    members = head(states.at(sequences.last_positions()[:, None]).float())[:, 0]
    expected = expected_rewards(heads, states, sequences) if "expected" in heads else None
    along = None
    if columns is not None:
        along = States(head(states.hidden.float()), states.packing).at(columns)
    return Readings(members, expected, along)
