"""Runs one step of a method under the tracker, on real tensors or on fake ones, and returns its profile.

The trainer, the rollout and the model are the ones that train. Weights are random: bytes do not depend on them. Responses
have given lengths, so that every method does the same work. A simulation leaves out repetition that can add no new peak:
`fake.LeapingDecoder` and `fake.no_repetition` say which.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hydra_ppo.model.loading import resolve_device
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.profiling.measuring.allocator import Allocator, snapshot
from hydra_ppo.profiling.measuring.record import SHARED, Profile
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.profiling.subjects.baselines import SeparateModels
from hydra_ppo.profiling.subjects.fake import fake_tensors, no_repetition
from hydra_ppo.profiling.subjects.ranks import pretended, watched
from hydra_ppo.profiling.subjects.shapes import model_config
from hydra_ppo.profiling.subjects.subjects import Builder, Models
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.runtime.host_tensors import is_on_host
from hydra_ppo.training import eight_bit
from hydra_ppo.training.optim import state_tensors

WARM_UP = "warm-up"
"""What makes the optimizer state; it is no part of a step, nor of loading, and is left out."""


def capture(
    workload: Workload,
    method: str = "hydra",
    *,
    simulate: bool,
    stage: Literal["ppo", "reward", "sft"] = "ppo",
    device: str = "auto",
    config: Any = None,
    timeline: bool = True,
    timed_steps: int = 0,
    on_model: Callable[[Models], None] = lambda model: None,
    tracker: Tracker | None = None,
    decoder: type[Decoder] | None = None,
    snapshot_to: Path | None = None,
    world: World = ALONE,
) -> Profile:
    """Profile one step, after the optimizer has made its state.

    Args:
        workload: model and sizes.
        method: of `baselines.METHODS`, or of `subjects.REWARD_STAGES`.
        simulate: use fake tensors.
        stage: ppo, or reward, sft: one step of reward modelling, alone or with SFT, on pairs of two sequences each.
        device: of a real run.
        config: Hugging Face config, where it is not `workload.model`'s.
        timeline: keep live bytes over the step.
        timed_steps: of a real run, more steps without the tracker, for responses per second.
        on_model: called with the models once they are built.
        tracker: takes the counts; a fresh one where None.
        decoder: what decodes; None is the usual one, in a simulation the one that leaps.
        snapshot_to: file for the CUDA allocator's own record of a real run.
        world: of a real run, the processes that have met, as many as the workload says.

    Raises:
        ConfigError: when the method cannot be had with this workload.
    """
    started = time.perf_counter()
    workload.check_method(method)
    workload.check_stage(stage)
    config = config if config is not None else model_config(workload.model)
    place = torch.device("cpu") if simulate else resolve_device(device)
    eight_bit.check_available(workload.optimizer, None if simulate else place.type)
    if not simulate:
        gc.collect()  # models refer to themselves; what an earlier capture left would count on a GPU
    tracker = tracker or Tracker()
    allocator = Allocator(place)
    roles: dict[str, list[nn.Parameter]] = {}
    in_turn = workload.update_order == "in-turn"
    optimizers: list[torch.optim.Optimizer] = []
    state_bytes = 0
    silent = False

    def on_phase(phase: str) -> None:
        nonlocal state_bytes
        if silent:
            return
        tracker.phase(phase)
        allocator(phase)
        if phase.startswith("update"):
            for optimizer in optimizers:  # again, for those that were away
                label_state(tracker, optimizer, roles)
                state_bytes = max(state_bytes, storage_bytes(t for t in state_tensors(optimizer) if not is_on_host(t)))
            if simulate:
                role = phase.removeprefix("update-")
                _make_gradients(tracker, {role: roles[role]} if in_turn else roles)

    with ExitStack() as stack:
        stack.enter_context(snapshot(place, snapshot_to))
        if simulate:
            world = stack.enter_context(pretended(workload.world, workload.rollout_batch, tracker.resized))
            stack.enter_context(fake_tensors())
            stack.enter_context(no_repetition())
        elif workload.shard_base:
            stack.enter_context(watched(tracker.resized))
        stack.enter_context(tracker)
        allocator("load")
        builder = Builder(workload, config, method, stage, place, simulate, decoder, world)
        model = builder.models()
        on_model(model)
        tracker.role = lambda: model.current_role
        roles.update(label_weights(tracker, model))
        subject = builder.subject(model, on_phase)
        tracker.watch(roles)
        on_phase(WARM_UP)
        subject.warm_up()
        label_state(tracker, subject.optimizer, roles)
        optimizers.append(subject.optimizer)
        subject.step()
        allocator("end")
        static = tracker.labelled("base weights", "adapters", "heads")
        gradients = [sum(map(bytes_of, parameters)) for parameters in roles.values()]
        floor = static + (max(gradients) if in_turn else sum(gradients)) + state_bytes
    seconds = time.perf_counter() - started
    rate = None
    if timed_steps and not simulate:
        silent = True
        rate = workload.rollout_batch / median_seconds(subject.step, timed_steps, place)
    return Profile(
        method=method,
        settings=workload.settings() | {"stage": stage},
        simulated=simulate,
        device=_device_name(place),
        static_bytes=static,
        floor_bytes=floor,
        phases={phase: peak for phase, peak in tracker.peaks().items() if phase != WARM_UP},
        timeline=tracker.timeline(skip=("load", WARM_UP)) if timeline else None,
        allocator={phase: peaks for phase, peaks in allocator.peaks.items() if phase != WARM_UP} or None,
        responses_per_second=rate,
        seconds=seconds,
        host_bytes=tracker.host_peak,
    )


def _make_gradients(tracker: Tracker, roles: dict[str, list[nn.Parameter]]) -> None:
    """Give the trained parameters of these roles the gradient that all but the first micro-batch of a minibatch find."""
    for role, parameters in roles.items():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                tracker.label([parameter.grad], "gradients", role)


def label_weights(tracker: Tracker, model: Models) -> dict[str, list[nn.Parameter]]:
    """Tell the tracker what the weights are for; return the trained parameters by role, each once."""
    parts = list(model.models) if isinstance(model, SeparateModels) else [model]
    trained: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for part in parts:
        owner = SHARED if len(parts) == 1 else next(iter(part.roles))
        tracker.label(base_tensors(part.causal_lm), "base weights", owner)
        for role in part.roles:
            mine = [p for p in part.role_parameters(role).values() if id(p) not in seen]
            seen |= {id(p) for p in mine}
            if role in part.trainable_roles:
                trained[role] = mine
            spec = part.roles[role]
            if spec.adapter is not None:
                tracker.label((p for n, p in part.role_parameters(role).items() if "lora_" in n), "adapters", role)
            if spec.head != "lm":
                tracker.label(part.heads[spec.head].parameters(), "heads", role)
            if spec.head == "reward" and part.expects:
                tracker.label(part.heads["expected"].parameters(), "heads", role)
    return trained


def label_state(tracker: Tracker, optimizer: torch.optim.Optimizer, roles: dict[str, list[nn.Parameter]]) -> None:
    """Tell the tracker whose state of the optimizer is whose; what is in host memory is no part of its count."""
    for role, parameters in roles.items():
        states = [optimizer.state[p] for p in parameters]
        tracker.label((t for state in states for t in state.values() if isinstance(t, Tensor)), "optimizer", role)


def base_tensors(causal_lm: nn.Module) -> Iterable[Tensor]:
    """Yield what the base is held in: weights and buffers without adapters, and the scales of quantised layers."""
    for name, parameter in causal_lm.named_parameters():
        if "lora_" not in name:
            yield parameter
    yield from causal_lm.buffers()
    for module in causal_lm.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        held = [state, getattr(state, "state2", None), weight, getattr(module, "state", None)]
        for holder in held:
            for name in ("absmax", "code", "offset", "CB", "SCB"):
                if isinstance(tensor := getattr(holder, name, None), Tensor):
                    yield tensor


def median_seconds(step: Callable[[], Any], count: int, place: torch.device) -> float:
    """Return the median duration of `count` steps, in seconds."""
    durations = []
    for _ in range(count):
        _wait(place)
        begun = time.perf_counter()
        step()
        _wait(place)
        durations.append(time.perf_counter() - begun)
    return median(durations)


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _device_name(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else place.type


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of what tensors lie in, each storage once."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
