"""Predicts the peaks of set-ups of one model and one length, from simulations that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch

from hydra_ppo.compute.logprobs import CHUNK_BYTES
from hydra_ppo.model.architecture import inspect_architecture, is_linear
from hydra_ppo.model.loading import DTYPES
from hydra_ppo.profiling.cli.ahead import Ahead
from hydra_ppo.profiling.cli.ladder import savings_of
from hydra_ppo.profiling.measuring.capture import WARM_UP
from hydra_ppo.profiling.measuring.recording import Scale
from hydra_ppo.profiling.measuring.shallow import Step, any_scale, simulated_step, with_depth
from hydra_ppo.profiling.subjects.fake import meta_model
from hydra_ppo.profiling.subjects.shapes import model_config
from hydra_ppo.profiling.workload import Workload

MICROS = (1, 2, 4, 8, 16)
BITS = {"int8": 8, "nf4": 4}


class Predictor:
    """Predicts what set-ups of one model and one length need.

    Args:
        workload: model, compute type and lengths.
        say: takes a line about what is being simulated.
        micros: rows of a micro-batch that will be asked for.
        workers: processes that simulate; 1 is this one alone. With more it has to be closed, by `with`.

    Attributes:
        parameters: of the base.
        trained: adapters that are.
    """

    def __init__(
        self, workload: Workload, say: Callable[[str], None], micros: Sequence[int] = MICROS, workers: int = 1
    ) -> None:
        self.say = say
        self.config = model_config(workload.model)
        self.layers: int = self.config.num_hidden_layers
        self.itemsize = DTYPES[workload.dtype].itemsize
        self.parameters, self.linear, self.adapter = parameters(self.config)
        self.trained = 2 if workload.advantage == "gae" else 1
        self._known: dict[Workload, Step] = {}
        self._ahead = Ahead(partial(_simulate, self.config, tuple(micros)), workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._ahead.__exit__(*failure)

    def begin(self, workloads: Iterable[Workload]) -> None:
        """Begin to simulate what may be asked for soon, where there are processes for that."""
        self._ahead.begin(any_scale(workload) for workload in workloads)

    def phases(self, workload: Workload) -> dict[str, int]:
        """Return the predicted peak of each phase, bytes; loading, which comes once and before, is left out."""
        return {phase: size for phase, size in self.with_loading(workload).items() if phase != "load"}

    def with_loading(self, workload: Workload) -> dict[str, int]:
        """Return the predicted peak of each phase and of loading, bytes: each weight is quantised as it comes."""
        scale = Scale(workload.rollout_batch // workload.world, workload.microbatch, workload.rank)
        with _blocks_of_a_gpu():  # some set-ups are simulated when they are asked for
            found = self._step(workload).phases(self.layers, scale, workload.trunk_layers)
        return {phase: size for phase, size in found.items() if phase != WARM_UP}

    def rollout(self, workload: Workload) -> int:
        """Return the predicted peak of sampling, which depends on the rollout batch."""
        return self.phases(workload)["rollout"]

    def training(self, workload: Workload) -> int:
        """Return the predicted peak of all else, which depends on the micro-batch."""
        return max(size for phase, size in self.with_loading(workload).items() if phase != "rollout")

    def least(self, workload: Workload) -> int:
        """Return what the base's linear layers alone take, without a simulation: no set-up needs less."""
        bits = BITS.get(workload.quantization or "", 8 * self.itemsize)
        return self.linear * bits // 8 // (workload.world if workload.shard_base else 1)

    def moments(self, rank: int) -> int:
        """Return the bytes of AdamW's moments of the adapters that are trained."""
        return self.trained * 2 * 4 * rank * self.adapter

    def fits(self, workload: Workload, usable: int) -> bool:
        """Return whether all phases fit; what cannot, whatever the rest takes, is not simulated."""
        return self.least(workload) <= usable and max(self.with_loading(workload).values()) <= usable

    def knows(self, workload: Workload) -> bool:
        """Return whether its prediction needs no new simulation."""
        return any_scale(workload) in self._known

    def _step(self, workload: Workload) -> Step:
        shape = any_scale(workload)
        if shape not in self._known:
            settings = [saving.name for saving in savings_of(shape)]
            settings += [] if shape.checkpointing else ["model.gradient_checkpointing=false"]
            settings += [f"shared out over {shape.world}"] if shape.shard_base else []
            self.say(f"simulating {shape.model}: {', '.join(settings) or 'nothing saved'}")
            self._known[shape] = self._ahead.result(shape)
        return self._known[shape]


def _simulate(config: Any, micros: tuple[int, ...], shape: Workload) -> Step:
    with _blocks_of_a_gpu():
        return simulated_step(shape, config, micros)


def parameters(config: Any) -> tuple[int, int, int]:
    """Return how many parameters a model has, how many of them are in linear layers, the only ones that are quantised with
    the base, and how many an adapter of rank 1 has."""
    shallow, deeper = (_numbers(with_depth(config, depth)) for depth in (1, 2))
    whole, linear, adapter = (a + (config.num_hidden_layers - 1) * (b - a) for a, b in zip(shallow, deeper, strict=True))
    return whole, linear, adapter


def _numbers(config: Any) -> tuple[int, int, int]:
    """Return the same of a model that is built."""
    model = meta_model(config, torch.bfloat16)
    linear = [part for layer in inspect_architecture(model).layers for part in layer.modules() if is_linear(part)]
    weights = [part.weight for part in linear]
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(weight.numel() for weight in weights),
        sum(sum(weight.shape) for weight in weights),
    )


@contextmanager
def _blocks_of_a_gpu() -> Iterator[None]:
    """Compute log-probs of fake tensors, which say that they are on a CPU, in the blocks that a GPU takes: larger and fewer."""
    before = CHUNK_BYTES["cpu"]
    CHUNK_BYTES["cpu"] = CHUNK_BYTES["cuda"]
    try:
        yield
    finally:
        CHUNK_BYTES["cpu"] = before
