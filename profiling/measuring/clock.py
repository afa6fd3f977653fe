"""The seconds that each phase of a step takes."""

from __future__ import annotations

import time

import torch


class PhaseClock:
    """Listens to phases and keeps the seconds of each, waiting for the device wherever one ends.

    Args:
        device: that the work is done on.

    Attributes:
        seconds: by phase, those of a phase that came several times added up.
        phase: that runs; None before the first and after `end`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None
        self._begun = 0.0

    def __call__(self, phase: str) -> None:
        """Begin `phase`; the one before it ends here, and `end` is none."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + (now - self._begun)
        self.phase = None if phase == "end" else phase
        self._begun = now
