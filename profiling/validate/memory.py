"""Measured against simulated peaks of memory."""

from __future__ import annotations

import re
from typing import Any

import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.clock import PhaseClock
from hydra_ppo.profiling.measuring.record import Profile
from hydra_ppo.profiling.measuring.shallow import with_depth
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.subjects.subjects import Builder
from hydra_ppo.profiling.validate.parts import require, shortened
from hydra_ppo.profiling.validate.speed import free, weights_made_on
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.rollout.sampling import sample

GOAL = 0.05
"""Largest relative difference between a simulated and a measured peak."""

PILOT_LAYERS, PILOT_TOKENS = 2, 8

KERNELS = re.compile("attention|flash|(?<!log)_softmax")
"""Operations that compute attention; a softmax of its own is what SDPA's plain kernel leaves."""


def check_memory(workload: Workload, config: Any, device: torch.device, seconds: float) -> dict[str, Any]:
    """Compare the peaks of a simulated and of a real step, phase by phase.

    Args:
        workload: model and sizes; responses are shortened where decoding would take too long.
        config: Hugging Face config of the model.
        device: of the real step.
        seconds: that this check may take.

    Returns:
        The chosen settings; by phase and for the whole step simulated, tracked, allocated and reserved bytes, ratios, and
        `within_goal` (None for loading, which a simulation does from a file and a real run here does not).

    Raises:
        NotRun: when bitsandbytes is missing, or the seconds do not suffice for responses of `LEAST_RESPONSE` tokens.
    """
    require(workload.quantization)
    with weights_made_on(device):
        step = tracked_decode_seconds(workload, config, device)
        chosen = shortened(workload, seconds, step)
        simulated = capture(chosen, simulate=True, config=config, timeline=False)
        before = free(device)
        tracker = Tracker()
        measured = capture(chosen, simulate=False, device=str(device), config=config, timeline=False, tracker=tracker)
    kernels = attention_kernels(tracker)
    del tracker  # it holds on to the model
    phases = {phase: compare_phase(simulated, measured, [phase]) for phase in measured.phases}
    phases["load"]["within_goal"] = None
    peak = compare_phase(simulated, measured, [phase for phase in measured.phases if phase != "load"])
    peak |= {"simulated_phase": simulated.peak_phase, "measured_phase": measured.peak_phase}
    judged = "simulated_to_allocated" if measured.allocator else "simulated_to_tracked"
    size = peak["allocated_bytes"] if measured.allocator else peak["tracked_bytes"]
    return {
        "settings": chosen.settings(),
        "response_asked_for": workload.response,
        "tracked_decode_step_seconds": step,
        "simulation_seconds": simulated.seconds,
        "measurement_seconds": measured.seconds,
        "phases": phases,
        "peak": peak,
        "allocated_before_bytes": before,
        "allocated_after_bytes": free(device),
        "attention_kernels": kernels,
        "judged_by": judged,
        "passed": peak["within_goal"] and all(found["within_goal"] is not False for found in phases.values()),
        "summary": f"peak {format_bytes(peak['simulated_bytes'])} simulated, {format_bytes(size)} measured: ratio "
        f"{peak[judged]:.3f}, phases {_span([found[judged] for phase, found in phases.items() if phase != 'load'])}",
    }


def compare_phase(simulated: Profile, measured: Profile, phases: list[str]) -> dict[str, Any]:
    """Return bytes of the highest of `phases` and ratios; on a CPU, where there is no allocator to ask, by the tracker."""
    fake = max(simulated.phases[phase].bytes for phase in phases)
    tracked = max(measured.phases[phase].bytes for phase in phases)
    allocator = measured.allocator or {}
    allocated = max((allocator[phase]["max_memory_allocated"] for phase in phases if phase in allocator), default=None)
    reserved = max((allocator[phase]["max_memory_reserved"] for phase in phases if phase in allocator), default=None)
    return {
        "simulated_bytes": fake,
        "tracked_bytes": tracked,
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "simulated_to_allocated": None if allocated is None else fake / allocated,
        "simulated_to_tracked": fake / tracked,
        "within_goal": abs(fake / (tracked if allocated is None else allocated) - 1) <= GOAL,
    }


def attention_kernels(tracker: Tracker) -> dict[str, list[str]]:
    """Return by phase the names of the operations that computed attention."""
    found: dict[str, set[str]] = {}
    for storage in tracker.storages:
        if KERNELS.search(storage.operation):
            found.setdefault(storage.phase, set()).add(storage.operation)
    return {phase: sorted(names) for phase, names in found.items()}


def tracked_decode_seconds(workload: Workload, config: Any, device: torch.device) -> float:
    """Return about the seconds of one decoding step under the tracker, from a model of `PILOT_LAYERS` layers."""
    layers = min(PILOT_LAYERS, config.num_hidden_layers)
    model = Builder(workload, with_depth(config, layers), "hydra", "ppo", device, False).models()
    rows = workload.rollout_batch
    settings = RolloutSettings(batch_size=rows, max_new_tokens=PILOT_TOKENS)
    generator = torch.Generator(device).manual_seed(0)

    def decode() -> None:
        sample(model, [[3] * PILOT_TOKENS] * rows, settings, [0], generator, lengths=[PILOT_TOKENS] * rows)

    with Tracker():
        decode()
        clock = PhaseClock(device)
        clock("decode")
        decode()
        clock("end")
    return clock.seconds["decode"] / PILOT_TOKENS * config.num_hidden_layers / layers


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.3f} to {max(ratios):.3f}"
