"""Predicts the memory of a deep model from simulations of two and of three of its layers (more where layers differ).

Decoder layers are alike, so at any one moment of a step every kind of memory is a constant plus a multiple of the number of
layers, and two depths give both; rows and ranks come from `recording`. Moments are compared stretch by stretch (each
announced phase is one, and sampling is cut at the end of the prompt), since which moment is a phase's highest may depend on
the depth. One layer is too few: its highest moment can be one that deeper models do not have. The tests hold this against
simulations of the whole depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from hydra_ppo.compute.logprobs import CHUNK_BYTES
from hydra_ppo.model.loading import DTYPES
from hydra_ppo.profiling.measuring.recording import HIGH, LOW, Call, Recording, Scale, Sizes, Unlike, bucket_of, record
from hydra_ppo.profiling.workload import Workload

WITH_ADAPTERS = ("adapters", "gradients", "optimizer", "activations")
"""Kinds that grow with the layers above the trunk; others grow with all layers."""


@dataclass(frozen=True)
class Stretch:
    """Bytes by kind at the peak of one stretch: constant and per layer; and what a trunk adds, whatever its depth."""

    phase: str
    constant: dict[str, float]
    per_layer: dict[str, float]
    with_trunk: float = 0.0

    def bytes(self, layers: int, trunk: int) -> float:
        """Return the predicted peak of a model of that depth."""
        total = self.with_trunk if trunk else 0.0
        for kind in self.constant.keys() | self.per_layer.keys():
            count = layers - trunk if kind in WITH_ADAPTERS and self.phase != "rollout" else layers
            if kind in ("adapters", "gradients", "optimizer"):
                count = layers - trunk
            total += self.constant.get(kind, 0.0) + count * self.per_layer.get(kind, 0.0)
        return total


class Step:
    """One PPO step of a model: what its phases need at any depth and rank, for any numbers of rows.

    Args:
        workload: how the model is held and trained, and its lengths; depth, rank and rows are free.
        config: Hugging Face config of the model.
        micros: rows of a micro-batch that will be asked for.

    Attributes:
        simulations: made so far. Three or four are enough where tensors are in proportion to rows and rank; where they are to
            rows alone, each rank takes as many; else each `Scale` that is asked for takes two more.
    """

    def __init__(self, workload: Workload, config: Any, micros: Sequence[int]) -> None:
        self._workload = any_scale(workload)
        self._depths = depths(config)
        self._configs = [with_depth(config, depth) for depth in self._depths]
        self._row = (workload.prompt + workload.response) * config.hidden_size * DTYPES[workload.dtype].itemsize
        self._micros = tuple(micros)
        self.simulations = 0
        self._calls: list[Call] | None = None
        self._known: dict[Scale | int, list[Sizes]] = {}
        self._rows_grow = True
        self._any = self._grown(LOW, HIGH)

    def _grown(self, few: Scale, many: Scale) -> list[Sizes] | None:
        """Return what two recordings say of both depths; None where they are unlike."""
        bucket = bucket_of(few) if few.rank != many.rank else None
        shallow = self._record(0, few, self._micros if self._calls is None else (), bucket)
        if self._calls is None:
            self._calls = shallow.calls  # neither the depth nor the rank changes them
        try:
            growths = shallow.growths(self._record(0, many, bucket=bucket and bucket_of(many)))
            deep = self._record(1, few, bucket=bucket)
            try:
                deeper = deep.growths_like(shallow, growths)
            except Unlike:
                deeper = deep.growths(self._record(1, many, bucket=bucket and bucket_of(many)))
        except Unlike:
            return None
        return [Sizes(shallow, growths, self._calls), Sizes(deep, deeper, self._calls)]

    def _record(self, which: int, scale: Scale, micros: Sequence[int] = (), bucket: int | None = None) -> Recording:
        self.simulations += 1
        return record(self._workload, self._configs[which], scale, micros, bucket)

    def _sizes(self, scale: Scale) -> list[Sizes]:
        """Return what holds at that scale, for both depths: at any, at any of that rank, or there alone."""
        if self._any is not None:
            return self._any
        if scale.rank not in self._known:
            found = self._grown(LOW._replace(rank=scale.rank), HIGH._replace(rank=scale.rank)) if self._rows_grow else None
            self._rows_grow = found is not None
            if found is not None:
                self._known[scale.rank] = found
        if scale.rank in self._known:
            return self._known[scale.rank]
        if scale not in self._known:
            self._known[scale] = [Sizes(self._record(which, scale, (scale.micro,))) for which in (0, 1)]
        return self._known[scale]

    def stretches(self, scale: Scale) -> list[Stretch]:
        """Return what each stretch of a step needs, trunk or not."""
        found = [sizes.peaks(scale) for sizes in self._sizes(scale)]
        stretches = []
        for (phase, low), (_, high) in zip(*found, strict=True):
            kinds = low.keys() | high.keys()
            few, many = self._depths
            slope = {kind: (high.get(kind, 0.0) - low.get(kind, 0.0)) / (many - few) for kind in kinds}
            constant = {kind: low.get(kind, 0.0) - few * slope[kind] for kind in kinds}
            stretches.append(
                Stretch(phase, constant, slope, trunk_rows(phase, scale, self._workload.checkpoint_offload) * self._row)
            )
        return stretches

    def phases(self, layers: int, scale: Scale, trunk: int = 0) -> dict[str, int]:
        """Return the predicted peak of each phase, in bytes."""
        peaks: dict[str, float] = {}
        for stretch in self.stretches(scale):
            peaks[stretch.phase] = max(stretch.bytes(layers, trunk), peaks.get(stretch.phase, 0.0))
        return {phase: round(size) for phase, size in peaks.items()}


_known: dict[tuple[Workload, str, int, tuple[int, ...]], Step] = {}


def simulated_step(workload: Workload, config: Any, micros: Sequence[int]) -> Step:
    """Return a `Step`; what was simulated in this process is not simulated again, whatever depth, rank and rows it is for."""
    shape = any_scale(replace(workload, model="any"))
    key = (shape, with_depth(config, 1).to_json_string(), CHUNK_BYTES["cpu"], tuple(micros))
    if key not in _known:
        _known[key] = Step(shape, config, micros)
    return _known[key]


def any_scale(workload: Workload) -> Workload:
    """Return what set-ups that differ in rows, rank and trunk have in common."""
    default = Workload(workload.model, rollout_batch=8 * workload.world)
    free = ("rank", "rollout_batch", "minibatch", "microbatch", "score_batch", "trunk_layers")
    return replace(workload, **{name: getattr(default, name) for name in free})


def trunk_rows(phase: str, scale: Scale, offload: bool = False) -> int:
    """Return of how many rows hidden states are kept above a trunk: of the rollout, its minibatch, a micro-batch.

    Args:
        offload: the host keeps what the graph does.
    """
    kept = 2 * scale.batch  # the rollout's and, as it is one, the minibatch's
    # In the updates a micro-batch's states take the place of its embedded tokens, which the first layer's graph keeps.
    updating = kept + (scale.micro if offload else 0)
    rows = {"score": scale.batch + scale.micro, "update-actor": updating, "update-critic": updating}
    rows["optimizer"] = kept
    return rows.get(phase, 0)


def depths(config: Any) -> tuple[int, int]:
    """Return at which depths to simulate: two and three layers; where layers differ, once and twice what they repeat."""
    types = getattr(config, "layer_types", None) or [None]
    period = next(p for p in range(1, len(types) + 1) if all(a == b for a, b in zip(types, types[p:], strict=False)))
    return (2, 3) if period == 1 else (period, 2 * period)


def with_depth(config: Any, layers: int) -> Any:
    """Return a copy of a Hugging Face config with that many layers."""
    config = deepcopy(config)
    config.num_hidden_layers = layers
    if (types := getattr(config, "layer_types", None)) is not None:
        config.layer_types = [types[i % len(types)] for i in range(layers)]
    return config
