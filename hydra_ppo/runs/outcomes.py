"""What a run's evaluations on held-out rows show: the first, the last, and the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_ppo.runs.series import series_of

EVALUATED = {
    "eval/scores": "score on held-out prompts",
    "eval/independent": "independent judge",
    "eval/kl": "KL to the reference, nats",
    "eval/response_length": "length, tokens",
    "eval/perplexity": "perplexity",
    "eval/reward_accuracy": "pairs ranked correctly",
    "eval/reward_ece": "calibration error",
}
"""What each metric is called."""
ERRORS = {"eval/scores": "eval_scores_gain_se", "eval/independent": "eval_independent_gain_se"}
"""Where the summary has the standard error of a gain, taken prompt by prompt."""


@dataclass(frozen=True)
class Outcome:
    """The evaluations of one metric.

    Attributes:
        name, label: of the metric.
        steps, values: of the first and the last evaluation; where there was one, both are it.
        error: standard error of the gain; None where it is not known.
    """

    name: str
    label: str
    steps: tuple[float, float]
    values: tuple[float, float]
    error: float | None

    @property
    def gain(self) -> float | None:
        """The last less the first; None where there was one."""
        return None if self.steps[0] == self.steps[1] else self.values[1] - self.values[0]


def outcomes(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Outcome]:
    """Return what was evaluated, in the order of `EVALUATED`.

    Args:
        records: of metrics.jsonl.
        summary: of summary.json; empty before the run is at its end.
    """
    found = []
    for name, label in EVALUATED.items():
        steps, values = series_of(records, name)
        if steps:
            error = summary.get(ERRORS.get(name, ""))
            known = error if isinstance(error, int | float) and len(steps) > 1 else None
            found.append(Outcome(name, label, (steps[0], steps[-1]), (values[0], values[-1]), known))
    return found
