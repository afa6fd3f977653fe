"""What torchrun, `accelerate launch` and `hydra-ppo launch` tell a process of its place among the others.

Imports no torch, so that the command line can ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hydra_ppo.errors import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """The place of a process.

    Attributes:
        rank, size: its number, and how many there are.
        local_rank, local_size: the same among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0


def place(variables: Mapping[str, str] | None = None) -> Place:
    """Return the place that the environment variables of torchrun give; that of a process alone where they are not set.

    Raises:
        ConfigError: some are set and others are not, or one is no number that can be.
    """
    found = os.environ if variables is None else variables
    if found.get("WORLD_SIZE", "1") in ("", "1") and found.get("RANK", "0") in ("", "0"):
        return Place()
    if missing := [name for name in NEEDED if not found.get(name)]:
        known = " ".join(f"{name}={found[name]}" for name in NEEDED if found.get(name))
        raise ConfigError(
            f"{known}: the environment says that there are several processes, and {missing[0]} is not set; start them with "
            "torchrun, or unset these."
        )
    rank, size = _number(found, "RANK", 0), _number(found, "WORLD_SIZE", 1)
    local_rank = _number(found, "LOCAL_RANK", 0) if found.get("LOCAL_RANK") else 0
    local_size = _number(found, "LOCAL_WORLD_SIZE", 1) if found.get("LOCAL_WORLD_SIZE") else max(1, local_rank + 1)
    for name, value, most, of in (
        ("RANK", rank, size, "WORLD_SIZE"),
        ("LOCAL_RANK", local_rank, local_size, "LOCAL_WORLD_SIZE"),
    ):
        if value >= most:
            raise ConfigError(f"{name}={value} is not below {of}={most}; start the processes with torchrun.")
    return Place(rank, size, local_rank, local_size)


def _number(found: Mapping[str, str], name: str, least: int) -> int:
    text = found[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text!r} is not a whole number of {least} or more; start the processes with torchrun.")
    return int(text)


def check_alone(what: str) -> None:
    """Refuse to do in several processes what one does.

    Raises:
        ConfigError: the environment says that there are several.
    """
    here = place()
    if here.size > 1:
        raise ConfigError(f"{what} runs in one process, and WORLD_SIZE={here.size}; start it without torchrun.")


def speaks(said_by: int | None) -> bool:
    """Say whether this process prints an error: where all have agreed on who does, that one, else one of each machine.

    Args:
        said_by: the rank that prints it; None for an error that came before the processes met.
    """
    try:
        here = place()
    except ConfigError:
        return True
    return here.local_rank == 0 if said_by is None else here.rank == said_by
