"""A metric over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def series_of(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a metric where it was measured."""
    steps: list[float] = []
    values: list[float] = []
    for record in records:
        value = record.get(name)
        step = record.get("step", len(steps))
        if isinstance(value, int | float) and math.isfinite(value) and isinstance(step, int | float):
            steps.append(step)
            values.append(value)
    return steps, values
