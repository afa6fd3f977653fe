"""The states of the global sources of random numbers, as plain values that another process can take over.

Of the libraries that are imported; none is imported for it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any


def read_states() -> dict[str, Any]:
    """Return the states of Python, and of numpy and torch (CPU) where they are imported."""
    states: dict[str, Any] = {"random": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state(legacy=False)
    if (torch := sys.modules.get("torch")) is not None:
        states["torch"] = bytes(torch.get_rng_state().tolist())
    return states


def write_states(states: Mapping[str, Any]) -> list[str]:
    """Take states over; return the names of the libraries that are not imported here."""
    missing = [name for name in states if name != "random" and name not in sys.modules]
    for name, state in states.items():
        if name not in missing:
            write_state(name, state)
    return missing


def write_state(name: str, state: Any) -> None:
    """Take over the state of one library, which is imported."""
    if name == "random":
        random.setstate(state)
    elif name == "numpy":
        sys.modules["numpy"].random.set_state(state)
    else:
        torch = sys.modules["torch"]
        torch.set_rng_state(torch.tensor(list(state), dtype=torch.uint8))
