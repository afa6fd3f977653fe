"""What TensorBoard and W&B are told: PPO's numbers under the names that TRL gives them, so that runs of both share charts.

``metrics.jsonl`` keeps its own names. A number is renamed only where TRL logs the same thing; all others keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

TRL = {
    "policy/loss": "loss/policy_avg",
    "policy/approx_kl": "policy/approxkl_avg",
    "policy/clip_frac": "policy/clipfrac_avg",
    "policy/entropy": "policy/entropy_avg",
    "policy/ratio": "val/ratio",
    "value/loss": "loss/value_avg",
    "value/clip_frac": "val/clipfrac_avg",
}
"""Own name: TRL's, where it is another. ``objective/kl``, ``objective/entropy``, ``objective/scores``,
``objective/rlhf_reward`` and ``lr`` are called alike. ``policy/approx_kl`` estimates the same divergence otherwise:
the mean of r - 1 - log r here, half the mean of (log r)² there."""

Value = TypeVar("Value")


def for_trackers(metrics: Mapping[str, Value], names: str) -> dict[str, Value]:
    """Return metrics under the names that trackers show.

    Args:
        metrics: under their own names.
        names: `run.tracker_names`.
    """
    return {TRL.get(name, name) if names == "trl" else name: value for name, value in metrics.items()}
