"""Numbers by name, as trainers log them."""

from __future__ import annotations

from collections.abc import Mapping

Metrics = dict[str, float | None]
"""None where there was nothing to measure."""


def measured(metrics: Mapping[str, float | None], name: str) -> float:
    """Return a number that every step measures."""
    found = metrics[name]
    assert found is not None
    return found
