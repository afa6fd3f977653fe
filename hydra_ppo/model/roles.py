"""What a base is while it trains: its roles, which of them receive gradients, and what their adapters start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hydra_ppo.errors import ConfigError

StageName = Literal["ppo", "ppo-ema", "policy", "policy-ema", "sft", "reward", "base"]


@dataclass(frozen=True)
class Role:
    """What the base is in one role: the adapter that is on (None: none) and the head that reads it."""

    adapter: str | None
    head: Literal["lm", "value", "reward"]


@dataclass(frozen=True)
class Stage:
    """A table of roles.

    Attributes:
        name: of the stage, in messages.
        roles: by name.
        trained: roles whose adapters and scalar heads receive gradients.
        tunes_base: whether the base itself is trained, in the roles that have no adapter.
        starts: the adapter that a new adapter starts as an exact copy of.
    """

    name: str
    roles: Mapping[str, Role]
    trained: tuple[str, ...]
    tunes_base: bool = False
    starts: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters; those that others start from come first."""
        used = {role.adapter for role in self.roles.values() if role.adapter is not None}
        return sorted(used, key=lambda name: (name in self.starts, name))


def build_stage(name: StageName, saved: Mapping[str, Any]) -> Stage:
    """Return the stage called `name`.

    Args:
        name: `ppo` trains actor and critic, `policy` the actor alone, `-ema` keeps a running mean of the actor beside it; `sft`
            or `reward` train the adapter of that name, `base` the base itself.
        saved: role table of the saved model it goes on from; empty for a plain base.

    Raises:
        ConfigError: when there is no such stage, or it would change the base under trained adapters.
    """
    reference = saved.get("reference", {}).get("adapter")
    reward = saved.get("reward", {}).get("adapter")
    if name == "sft":
        return Stage(name, {"reference": Role("sft", "lm"), "reward": Role("sft", "reward")}, ("reference", "reward"))
    if name == "reward":
        roles = {"reference": Role(reference, "lm"), "reward": Role("reward", "reward")}
        return Stage(name, roles, ("reward",), starts={"reward": reference})
    if name == "base":
        if reference or reward:
            raise ConfigError("method='full' would change the base under trained adapters; start from a plain base.")
        roles = {"reference": Role(None, "lm"), "reward": Role(None, "reward")}
        return Stage(name, roles, ("reference", "reward"), tunes_base=True)
    if name in ("ppo", "ppo-ema", "policy", "policy-ema"):
        roles = {"actor": Role("actor", "lm")}
        trained: tuple[str, ...] = ("actor",)
        starts: dict[str, str | None] = {"actor": reference}
        if name.startswith("ppo"):
            roles["critic"] = Role("critic", "value")
            trained, starts["critic"] = ("actor", "critic"), reward
        roles |= {"reference": Role(reference, "lm"), "reward": Role(reward, "reward")}
        if name.endswith("-ema"):
            roles["actor_ema"] = Role("actor_ema", "lm")
            starts["actor_ema"] = "actor"
        return Stage(name, roles, trained, starts=starts)
    raise ConfigError(f"train={name!r} is not a stage; choose among {', '.join(get_args(StageName))}.")
