"""How a setting is declared and checked."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Any, Literal

from hydra_ppo.errors import ConfigError

Quantization = Literal["int8", "nf4", "fp4"]


def setting(default: Any, help: str) -> Any:
    """Declare a field with a default (a callable builds mutable ones) and its help text."""
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Declare a field without a default."""
    return field(metadata={"help": help})


def check(config: Any, name: str, ok: bool, rule: str, remedy: str) -> None:
    """Raise ConfigError, which names the value, the rule that it breaks and the remedy, where `ok` is false."""
    if not ok:
        raise ConfigError(f"{name}={getattr(config, name)!r} {rule}; {remedy}.")


def positive(config: Any, *names: str) -> None:
    """Check that those settings are null or greater than 0."""
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or value > 0, "must be greater than 0", f"set {name} to a positive number")


def not_negative(config: Any, *names: str) -> None:
    """Check that those settings are null or not negative."""
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or value >= 0, "must not be negative", f"set {name} to 0 or more")


def fraction(config: Any, *names: str) -> None:
    """Check that those settings are null or lie in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        check(config, name, value is None or 0 <= value <= 1, "must lie in [0, 1]", f"choose {name} between 0 and 1")


def expand_home(config: Any, *names: str) -> None:
    """Put the home of a user in place of a leading `~`, which a shell leaves in `--name=~/folder` and in YAML."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str) and value.startswith("~"):
            object.__setattr__(config, name, os.path.expanduser(value))  # frozen for everybody else
