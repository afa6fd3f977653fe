"""The allocations of one simulated step in order, and what they are for other rows and ranks.

How many rows there are, and of what rank adapters are, decides two things only: how large tensors are, each in proportion to
some of these numbers, and into how many blocks log-probs cut the vocabulary. Two recordings that did the same things
therefore give the sizes for any numbers, and adding them up in order gives every moment, so that it need not be known
beforehand which one is the highest. Log-probs are held apart: what a call takes at most beyond its start is tried for all
rows that will be asked for, while the model is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.model import role_model
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.measuring.tracker import Tracker
from hydra_ppo.profiling.subjects.fake import LeapingDecoder
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.training import offloaded


class Scale(NamedTuple):
    """What sizes may be in proportion to: rows of a rollout, rows of a micro-batch, rank of the adapters."""

    batch: int
    micro: int
    rank: int


LOW, HIGH = Scale(5, 3, 16), Scale(6, 4, 20)
"""Of two recordings. No two of the `GROWTHS` are the same factor between them, so that it says what a tensor grows with."""

GROWTHS = ((), ("batch",), ("micro",), ("rank",), ("batch", "rank"), ("micro", "rank"))
"""What a tensor can be in proportion to."""

OF_RANK = ("adapters", "gradients", "optimizer")
"""Kinds whose tensors may be a constant and a multiple of the rank, such as all moments in one piece with counts of steps."""


class Growth(NamedTuple):
    """What a tensor is in proportion to, and how many of its bytes are not."""

    names: tuple[str, ...]
    fixed: int = 0


def bucket_of(scale: Scale) -> int:
    """Return how many bytes of offloaded moments have to come together for every rank to be cut into the same buckets.

    Each rank's own number of buckets would be another program. The rooms that they lie in are as large for any rank.
    """
    return offloaded.BUCKET_BYTES * scale.rank // LOW.rank


class Unlike(Exception):
    """Two recordings did not do the same things, or something is not in proportion to what was changed."""


@dataclass(frozen=True)
class Call:
    """One computation of log-probs.

    Attributes:
        start, end: events before it, and with it.
        extra: by rows of a micro-batch the most bytes beyond those at its start.
    """

    start: int
    end: int
    extra: dict[int, int]


@dataclass(frozen=True)
class Recording:
    """Births and deaths of one step, without what log-probs make and drop.

    Attributes:
        scale: of the step.
        events: +n where storage n-1 is born, -n where it dies.
        sizes, kinds: bytes of each storage, and what it is for.
        signatures: phase, kind, operation, shape and bytes of each.
        stretches: (phase, events before it) of every announced phase.
        calls: of log-probs.
    """

    scale: Scale
    events: list[int]
    sizes: list[int]
    kinds: list[str]
    signatures: list[tuple[Any, ...]]
    stretches: list[tuple[str, int]]
    calls: list[Call]

    def growths(self, high: Recording) -> list[Growth]:
        """Return what each of these storages grows with, `high` being a recording of the same at another scale.

        Raises:
            Unlike: when `high` does not follow from this.
        """
        if (self.events, self.kinds, self.stretches) != (high.events, high.kinds, high.stretches):
            raise Unlike("at another scale there are other allocations")
        found = []
        ranks = high.scale.rank - self.scale.rank
        rooms = bucket_of(self.scale), bucket_of(high.scale)
        for signature, size, more in zip(self.signatures, self.sizes, high.sizes, strict=True):
            if signature[1] == "optimizer" and (size, more) == rooms:
                found.append(Growth(()))  # such a room is always as large
                continue
            fitting = [names for names in GROWTHS if more * _factor(names, self.scale) == size * _factor(names, high.scale)]
            if fitting:
                found.append(Growth(fitting[0]))
            elif signature[1] in OF_RANK and ranks:
                found.append(Growth(("rank",), size - (more - size) * self.scale.rank // ranks))
            else:
                raise Unlike(f"{signature} is in proportion to nothing that was changed")
        return found

    def growths_like(self, other: Recording, growths: Sequence[Growth]) -> list[Growth]:
        """Return what each of these storages grows with, from what like ones of another depth do, at the same scale.

        Raises:
            Unlike: when that leaves a choice.
        """
        known: dict[tuple[Any, ...], set[Growth]] = {}
        for signature, growth in zip(other.signatures, growths, strict=True):
            for key in (signature, signature[:3]):
                known.setdefault(key, set()).add(growth)
        found = []
        for signature in self.signatures:
            # A shape that is not there may be as long as there are layers.
            fitting = known.get(signature) or known.get(signature[:3], set())
            if len(fitting) != 1:
                raise Unlike(f"{signature} may grow with several things")
            found += fitting
        return found


def _factor(names: Sequence[str], scale: Scale) -> int:
    factor = 1
    for name in names:
        factor *= getattr(scale, name)
    return factor


def record(workload: Workload, config: Any, scale: Scale, micros: Sequence[int], bucket: int | None = None) -> Recording:
    """Simulate a step and record it.

    Args:
        workload: model, how it is trained, and lengths.
        config: Hugging Face config of the model.
        scale: rows and rank; scoring takes the rows of a micro-batch. Where several processes share a rollout out, the rows
            that each samples.
        micros: rows of a micro-batch for which calls of log-probs are tried.
        bucket: bytes of moments that come to the device together; None is what the program takes.
    """
    tracker = Tracker()
    calls: list[Call] = []

    class Marked(LeapingDecoder):
        def _advance(self, *args: Any) -> int:
            tracker.phase("rollout")  # a stretch of its own after the prompt
            return super()._advance(*args)

    def tried(*args: Any, **options: Any) -> Any:
        start = len(tracker.events)
        found = token_logprobs(*args, **options)
        extra = {micro: _most(tracker, micro, *args, **options) for micro in micros}
        calls.append(Call(start, len(tracker.events), extra))
        return found

    rows = scale.batch * workload.world
    sized = replace(workload, rollout_batch=rows, microbatch=scale.micro, score_batch=scale.micro, rank=scale.rank)
    bucket = offloaded.BUCKET_BYTES if bucket is None else bucket
    with patch.object(role_model, "token_logprobs", tried), patch.object(offloaded, "BUCKET_BYTES", bucket):
        capture(sized, simulate=True, config=config, timeline=False, tracker=tracker, decoder=Marked)
    return _collapsed(tracker, calls, scale)


def _most(tracker: Tracker, micro: int, hidden: Any, tokens: Any, head: Any, **options: Any) -> int:
    """Return the most bytes that log-probs of that many rows take, beside the hidden states (B, R, H) that they are given."""
    rows = hidden.detach().new_empty(micro, *hidden.shape[1:]).requires_grad_(hidden.requires_grad)
    ids = tokens.new_zeros(micro, tokens.shape[1])
    start = len(tracker.events)
    token_logprobs(rows, ids, head, **options)
    return tracker.most(start, len(tracker.events))


def _collapsed(tracker: Tracker, calls: Sequence[Call], scale: Scale) -> Recording:
    """Leave out what was born and died within a call of log-probs."""
    dropped: set[int] = set()
    for call in calls:
        within = tracker.events[call.start : call.end]
        dropped |= {event for event in within if event > 0} & {-event for event in within if event < 0}
    before = [0]  # events that are left before each event
    numbers: dict[int, int] = {}
    events = []
    for event in tracker.events:
        if abs(event) not in dropped:
            number = numbers.setdefault(abs(event), len(numbers) + 1)
            events.append(number if event > 0 else -number)
        before.append(len(events))
    storages = [tracker.storages[number - 1] for number in numbers]
    return Recording(
        scale=scale,
        events=events,
        sizes=[storage.bytes for storage in storages],
        kinds=[storage.kind for storage in storages],
        signatures=[(s.phase, s.kind, s.operation, s.shape, s.bytes) for s in storages],
        stretches=[("load", 0)] + [(phase, before[first]) for phase, first in tracker.phases],
        calls=[Call(before[call.start], before[call.end], call.extra) for call in calls],
    )


class Sizes:
    """The sizes of a recorded step's tensors at any scale.

    Args:
        recording: a step.
        growths: what each of its storages grows with; without, it holds at its own scale alone.
        calls: tried calls of log-probs, where they are not the recording's own.
    """

    def __init__(
        self, recording: Recording, growths: Sequence[Growth] | None = None, calls: Sequence[Call] | None = None
    ) -> None:
        self._low = recording
        self._extra = [call.extra for call in (recording.calls if calls is None else calls)]
        self._names = sorted(set(recording.kinds))
        events = np.array(recording.events)
        self._signs, self._numbers = np.sign(events), np.abs(events) - 1
        self._kinds = np.array([self._names.index(kind) for kind in recording.kinds])[self._numbers]
        self._bytes = np.array(recording.sizes, dtype=float)
        growths = growths or [Growth(())] * len(recording.sizes)
        self._growths = np.array([GROWTHS.index(growth.names) for growth in growths])
        self._fixed = np.array([growth.fixed for growth in growths], dtype=float)

    def peaks(self, scale: Scale) -> list[tuple[str, dict[str, float]]]:
        """Return (phase, bytes by kind at its peak) of every stretch."""
        factors = np.array([_factor(names, scale) / _factor(names, self._low.scale) for names in GROWTHS])
        sizes = self._fixed + (self._bytes - self._fixed) * factors[self._growths]
        changes = self._signs * sizes[self._numbers]
        totals = np.concatenate([[0.0], np.cumsum(changes)])
        ends = [first for _, first in self._low.stretches[1:]] + [len(changes)]
        found = []
        for (phase, first), end in zip(self._low.stretches, ends, strict=True):
            at, more = first + int(np.argmax(totals[first : end + 1])), 0.0
            for call, extra in zip(self._low.calls, self._extra, strict=True):
                if first <= call.start < end and totals[call.start] + extra[scale.micro] > totals[at] + more:
                    at, more = call.start, float(extra[scale.micro])
            kinds = self._composition(changes, at)
            kinds["log-probs"] = kinds.get("log-probs", 0.0) + more
            found.append((phase, kinds))
        return found

    def _composition(self, changes: NDArray[np.float64], count: int) -> dict[str, float]:
        found = np.bincount(self._kinds[:count], weights=changes[:count], minlength=len(self._names))
        return dict(zip(self._names, found.tolist(), strict=True))
