"""Counts live tensor storages and says what each is for: role, kind and phase. Works on real and on fake tensors alike.

Every storage counts once, from the operation that made it until it dies. What an operation allocates and frees inside its
own kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_ppo.profiling.measuring.record import GATHERED, KINDS, SHARED, LiveTensor, Peak, Timeline
from hydra_ppo.runtime.announce import HOST, allocated_kind
from hydra_ppo.runtime.host_tensors import is_on_host
from hydra_ppo.runtime.memory import memory_of

LARGEST = 8
SAMPLES = 1500


@dataclass(slots=True)
class Storage:
    """One storage: what it is for may become known after it was made."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    role: str
    phase: str
    operation: str


class Tracker(TorchDispatchMode):
    """Records the birth and death of every storage while it is active.

    Args:
        role: asked for the role in force whenever something is allocated.

    Attributes:
        host_bytes, host_peak: live bytes now, and the most there were, of what `host_tensors` made; no part of the rest.

    Memory: about 300 bytes per allocation, on the host.
    """

    def __init__(self, role: Callable[[], str | None] = lambda: None) -> None:
        super().__init__()
        self.role = role
        self.storages: list[Storage] = []
        self.events: list[int] = []  # +n: storage n-1 was born; -n: it died
        self.phases: list[tuple[str, int]] = []  # phase and the number of events before it
        self.host_bytes = self.host_peak = 0
        self._on_host: weakref.WeakSet[Any] = weakref.WeakSet()
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._phase = "load"
        self._hooks: list[Any] = []
        self._dead: set[int] = set()

    # -- taking in -------------------------------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name
        self.phases.append((name, len(self.events)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inner = self._begin_inner(func, args)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            self._see(tensor, func)
        for tensor in _tensors(args):  # made where no dispatch mode sees it, such as torch.tensor of a list
            self._see(tensor, None)
        if kwargs:
            for tensor in _tensors(kwargs.values()):
                self._see(tensor, None)
        if inner is not None:
            self._died(inner)
        return result

    def _begin_inner(self, func: Any, args: tuple[Any, ...]) -> int | None:
        """Count the layer that bitsandbytes' 4-bit product dequantises inside its kernel; return its number, if there is one.

        On CUDA small products (up to some hundreds of rows, by GPU) do without: there the count is too high by one layer.
        """
        if func.namespace != "bitsandbytes" or func._schema.name != "bitsandbytes::gemm_4bit":
            return None
        shape, dtype = tuple(args[2]), args[0].dtype
        return self._born(shape[0] * shape[1] * dtype.itemsize, shape, dtype, "dequantised weights", func)

    def _see(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type == "meta":
            return
        tensor = getattr(tensor, "_local_tensor", tensor)  # of what several processes hold in parts, the part here
        storage = memory_of(tensor)
        if storage in self._numbers or storage in self._on_host:
            return
        if allocated_kind() == HOST or is_on_host(tensor):
            self._keep_on_host(storage)
            return
        role = self.role()
        number = self._born(storage.nbytes(), tuple(tensor.shape), tensor.dtype, self._kind(func, role), func)
        self._numbers[storage] = number
        weakref.finalize(storage, self._died, number)

    def _born(self, size: int, shape: tuple[int, ...], dtype: torch.dtype, kind: str, func: Any) -> int:
        number = len(self.storages)
        role = self.role()
        operation = "" if func is None else func._schema.name
        owner = SHARED if role is None or kind == "experience" else role
        self.storages.append(Storage(size, shape, dtype, kind, owner, self._phase, operation))
        self.events.append(number + 1)
        return number

    def _keep_on_host(self, storage: Any) -> None:
        size = storage.nbytes()
        self._on_host.add(storage)
        self.host_bytes += size
        self.host_peak = max(self.host_peak, self.host_bytes)
        weakref.finalize(storage, self._left_host, size)

    def _left_host(self, size: int) -> None:
        self.host_bytes -= size

    def _died(self, number: int) -> None:
        if number in self._dead:
            self._dead.discard(number)
        else:
            self.events.append(-number - 1)

    def resized(self, tensor: Tensor) -> None:
        """Take in that a storage was emptied or filled again, which no dispatch mode sees."""
        storage = tensor.untyped_storage()
        if (number := self._numbers.pop(storage, None)) is not None:
            self._died(number)
            self._dead.add(number)  # once more when the storage itself goes
        if size := storage.nbytes():
            number = self._born(size, tuple(tensor.shape), tensor.dtype, GATHERED, None)
            self._numbers[storage] = number
            weakref.finalize(storage, self._died, number)

    def _kind(self, func: Any, role: str | None) -> str:
        announced = allocated_kind()
        if announced is not None:
            return announced
        if self._phase == "optimizer":
            return "optimizer"
        if func is not None and func.namespace == "bitsandbytes" and "dequantize" in func._schema.name:
            return "dequantised weights"
        return "activations" if role is not None else "other"

    def label(self, tensors: Iterable[Tensor], kind: str, role: str = SHARED) -> None:
        """Say what these tensors are for; those not seen before are alive from now on."""
        for tensor in tensors:
            self._see(tensor, None)
            part = getattr(tensor, "_local_tensor", tensor)
            if (number := self._numbers.get(part.untyped_storage())) is not None:  # None: it is the host's
                self.storages[number].kind, self.storages[number].role = kind, role

    def watch(self, parameters: dict[str, Iterable[nn.Parameter]]) -> None:
        """Label gradients of parameters, by role, as they arise; a parameter of several roles counts for the first."""
        seen: set[int] = set()
        for role, listed in parameters.items():
            for parameter in listed:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_labeller(role)))

    def _gradient_labeller(self, role: str) -> Callable[[Tensor], None]:
        def label(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.label([parameter.grad], "gradients", role)

        return label

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*exception)

    # -- reading out -----------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Live bytes now."""
        return sum(self._size(event) for event in self.events)

    def labelled(self, *kinds: str) -> int:
        """Live bytes now of these kinds."""
        return sum(self._size(event) for event in self.events if self.storages[abs(event) - 1].kind in kinds)

    def most(self, first: int, end: int) -> int:
        """Most live bytes after any of these events, beyond those before the first."""
        total = most = 0
        for event in self.events[first:end]:
            total += self._size(event)
            most = max(most, total)
        return most

    def _size(self, event: int) -> int:
        return self.storages[event - 1].bytes if event > 0 else -self.storages[-event - 1].bytes

    def _stretches(self) -> Iterator[tuple[str, int, int]]:
        """Yield (phase, first event, end) in order."""
        starts = self.phases if self.phases and self.phases[0][1] == 0 else [("load", 0), *self.phases]
        for index, (phase, first) in enumerate(starts):
            end = starts[index + 1][1] if index + 1 < len(starts) else len(self.events)
            yield phase, first, end

    def peaks(self) -> dict[str, Peak]:
        """Return for each phase, in the order in which they first came, its peak and what was alive then."""
        highest: dict[str, Peak] = {}
        for phase, peak in self.stretch_peaks():
            if phase not in highest or peak.bytes > highest[phase].bytes:
                highest[phase] = peak
        return highest

    def stretch_peaks(self) -> list[tuple[str, Peak]]:
        """Return (phase, its peak) for every time that a phase was announced, in order."""
        total = 0
        found = []
        for phase, first, end in self._stretches():
            best = (total, first)  # bytes, number of events up to and including that moment
            for position in range(first, end):
                total += self._size(self.events[position])
                if total > best[0]:
                    best = (total, position + 1)
            found.append((phase, best[1]))
        compositions = self._compositions({position for _, position in found})
        return [(phase, compositions[position]) for phase, position in found]

    def _compositions(self, positions: set[int]) -> dict[int, Peak]:
        live: set[int] = set()
        found = {0: _peak([])} if 0 in positions else {}
        for position, event in enumerate(self.events, start=1):
            if event > 0:
                live.add(event - 1)
            else:
                live.discard(-event - 1)
            if position in positions:
                found[position] = _peak([self.storages[number] for number in live])
        return found

    def timeline(self, skip: tuple[str, ...] = (), samples: int = SAMPLES) -> Timeline:
        """Thin the record out to about `samples` moments, each the highest of its stretch, without the phases in `skip`."""
        stretches = [s for s in self._stretches() if s[0] not in skip and s[2] > s[1]]
        count = sum(end - first for _, first, end in stretches)
        width = max(1, -(-count // samples))
        moments: list[int] = []  # numbers of events up to and including each moment
        phases: list[tuple[str, int]] = []
        totals = [0]
        for event in self.events:
            totals.append(totals[-1] + self._size(event))
        for phase, first, end in stretches:
            phases.append((phase, len(moments)))
            for start in range(first, end, width):
                moments.append(1 + max(range(start, min(start + width, end)), key=lambda i: totals[i + 1]))
        kinds = dict.fromkeys(KINDS, 0)
        series: dict[str, list[int]] = {kind: [] for kind in KINDS}
        done = 0
        for moment in moments:
            for event in self.events[done:moment]:
                storage = self.storages[abs(event) - 1]
                kinds[storage.kind] += storage.bytes if event > 0 else -storage.bytes
            done = moment
            for kind in KINDS:
                series[kind].append(kinds[kind])
        return Timeline({kind: values for kind, values in series.items() if any(values)}, phases)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among operator arguments, those in lists included; much faster than a pytree walk."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _peak(live: list[Storage]) -> Peak:
    by_role: dict[str, dict[str, int]] = {}
    for storage in live:
        kinds = by_role.setdefault(storage.role, {})
        kinds[storage.kind] = kinds.get(storage.kind, 0) + storage.bytes
    # The weights of the base are no news.
    largest = sorted((s for s in live if s.kind != "base weights"), key=lambda storage: -storage.bytes)[:LARGEST]
    return Peak(
        sum(storage.bytes for storage in live),
        by_role,
        [
            LiveTensor(s.bytes, s.shape, str(s.dtype).removeprefix("torch."), s.kind, s.role, s.phase, s.operation)
            for s in largest
        ],
    )
