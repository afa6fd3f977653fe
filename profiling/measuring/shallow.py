"""Predicts the memory of a deep model from simulations of two and of three of its layers.

Decoder layers are alike, so at any one moment of a step every kind of memory is a constant plus a multiple of the number of
layers, and two simulations give both. Moments are compared stretch by stretch (each announced phase is one, and sampling is
cut at the end of the prompt), since which moment is a phase's highest may depend on the depth. One layer is too few: its
highest moment can be one that deeper models do not have. The tests hold this against simulations of the whole depth.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from hydra_ppo.compute.logprobs import CHUNK_BYTES
from hydra_ppo.model.loading import DTYPES
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.profiling.subjects.fake import LeapingDecoder
from hydra_ppo.profiling.workload import Workload

DEPTHS = (2, 3)

WITH_ADAPTERS = ("adapters", "gradients", "optimizer", "activations")
"""Kinds that grow with the layers above the trunk; others grow with all layers."""

OF_RANK = ("adapters", "gradients", "optimizer")
"""Kinds that are in proportion to the rank of the adapters."""


@dataclass(frozen=True)
class Stretch:
    """Bytes by kind at the peak of one stretch: constant and per layer; and what a trunk adds, whatever its depth."""

    phase: str
    constant: dict[str, float]
    per_layer: dict[str, float]
    with_trunk: float = 0.0

    def bytes(self, layers: int, trunk: int, rank_factor: float) -> float:
        """Return the predicted peak of a model of that depth."""
        total = self.with_trunk if trunk else 0.0
        for kind in self.constant.keys() | self.per_layer.keys():
            count = layers - trunk if kind in WITH_ADAPTERS and self.phase != "rollout" else layers
            if kind in OF_RANK:
                count = layers - trunk
            size = self.constant.get(kind, 0.0) + count * self.per_layer.get(kind, 0.0)
            total += size * (rank_factor if kind in OF_RANK else 1.0)
        return total


def simulate_stretches(workload: Workload, config: Any) -> list[Stretch]:
    """Simulate the workload at two depths and return what each stretch of a step needs; what is known is not run again."""
    workload = replace(workload, model="any", trunk_layers=0)
    key = (workload, with_depth(config, 1).to_json_string(), CHUNK_BYTES["cpu"])
    if key not in _known:
        _known[key] = _simulate(workload, config)
    return _known[key]


_known: dict[tuple[Workload, str, int], list[Stretch]] = {}


def _simulate(workload: Workload, config: Any) -> list[Stretch]:
    found = []
    for depth in DEPTHS:
        tracker = Tracker()

        class Marked(LeapingDecoder):
            def _advance(self, *args: Any, _phase: Any = tracker.phase) -> int:
                _phase("rollout")  # a stretch of its own after the prompt
                return super()._advance(*args)

        capture(
            workload,
            simulate=True,
            config=with_depth(config, depth),
            timeline=False,
            tracker=tracker,
            decoder=Marked,
        )
        found.append([(phase, peak.kinds) for phase, peak in tracker.stretch_peaks()])
    stretches = []
    for (phase, low), (_, high) in zip(*found, strict=True):
        kinds = low.keys() | high.keys()
        slope = {kind: (high.get(kind, 0) - low.get(kind, 0)) / (DEPTHS[1] - DEPTHS[0]) for kind in kinds}
        constant = {kind: low.get(kind, 0) - DEPTHS[0] * slope[kind] for kind in kinds}
        stretches.append(Stretch(phase, constant, slope, trunk_states(workload, config, phase)))
    return stretches


def trunk_states(workload: Workload, config: Any, phase: str) -> float:
    """Return the bytes of the hidden states that are kept above a trunk: of the rollout, its minibatch, a micro-batch."""
    kept = workload.rollout_batch + (workload.minibatch or workload.rollout_batch)
    # In the updates a micro-batch's states take the place of its embedded tokens, which the first layer's graph keeps.
    updating = kept + (workload.microbatch if workload.checkpoint_offload else 0)  # where the host keeps what the graph does
    rows = {"score": workload.rollout_batch, "update-actor": updating, "update-critic": updating}
    rows["optimizer"] = kept + workload.microbatch
    row = (workload.prompt + workload.response) * config.hidden_size * DTYPES[workload.dtype].itemsize
    return float(rows.get(phase, 0) * row)


def with_depth(config: Any, layers: int) -> Any:
    """Return a copy of a Hugging Face config with that many layers."""
    config = deepcopy(config)
    config.num_hidden_layers = layers
    if (types := getattr(config, "layer_types", None)) is not None:
        config.layer_types = [types[i % len(types)] for i in range(layers)]
    return config


def predict(stretches: list[Stretch], layers: int, trunk: int = 0, rank_factor: float = 1.0) -> dict[str, int]:
    """Return the predicted peak of each phase, in bytes."""
    peaks: dict[str, float] = {}
    for stretch in stretches:
        peaks[stretch.phase] = max(stretch.bytes(layers, trunk, rank_factor), peaks.get(stretch.phase, 0.0))
    return {phase: round(size) for phase, size in peaks.items()}
