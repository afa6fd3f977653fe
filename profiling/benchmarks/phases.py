"""The three phases that benchmarks tell apart, and a clock of them: actor, critic and optimizer together are the update."""

from __future__ import annotations

import torch

from hydra_ppo.profiling.measuring.clock import PhaseClock

PHASES = ("rollout", "score", "update")


class Clock(PhaseClock):
    """Adds up seconds on a CPU by `PHASES`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def __call__(self, phase: str) -> None:
        """Begin a phase of the trainer; "end" begins none."""
        super().__call__(phase if phase in (*PHASES, "end") else "update")
