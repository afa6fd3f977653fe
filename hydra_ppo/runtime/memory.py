"""Peak memory by phase: the allocator's own count on a GPU, a count of live tensor storages on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_ppo.runtime.announce import HOST, allocated_kind
from hydra_ppo.runtime.host_tensors import is_on_host

CPU_STEPS = 2
"""Steps measured on a CPU with memory="auto"; counting every tensor costs time there, nothing on a GPU."""


class _Ordered:
    """Stands for the memory of a tensor that oneDNN keeps in an order of its own, without a storage; dies with the tensor."""

    def __init__(self, size: int) -> None:
        self.size = size

    def nbytes(self) -> int:
        return self.size


def memory_of(tensor: Tensor) -> Any:
    """Return what a tensor lies in: one object for all that lie in it, which dies with the last; `nbytes()` is its size."""
    if tensor.layout is not torch._mkldnn:  # type: ignore[attr-defined]
        return tensor.untyped_storage()
    if not hasattr(tensor, "_hydra_memory"):
        tensor._hydra_memory = _Ordered(tensor.numel() * tensor.element_size())  # type: ignore[attr-defined]
    return tensor._hydra_memory  # type: ignore[attr-defined]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are alive: each once, from its first use until it dies.

    What is kept in host memory (`host_tensors`) is left out, as it is on a GPU.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.bytes = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.peak = max(self.peak, self.bytes)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = memory_of(tensor)
        if storage not in self._known:
            self._known.add(storage)
            if allocated_kind() == HOST or is_on_host(tensor):
                return
            size = storage.nbytes()
            self.bytes += size
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size


class PhaseMemory:
    """Listens to phases and keeps the peak bytes of each.

    Args:
        model: its parameters and buffers count from the start.
        mode: "always", "never", or "auto" (every step on a GPU, the first `CPU_STEPS` on a CPU). A base that several processes
            share out is measured on a GPU alone.
    """

    def __init__(self, model: nn.Module, device: torch.device, mode: Literal["auto", "always", "never"]) -> None:
        self.model = model
        self.device = device
        self.mode = mode
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._live: LiveBytes | None = None
        self._on = False

    @contextmanager
    def step(self, number: int, others: Iterable[Tensor] = ()) -> Iterator[None]:
        """Measure inside the block where the mode says so; `peaks` is empty where it does not.

        Args:
            number: of the step, from 0.
            others: tensors besides the model's that are alive already, such as optimizer state.
        """
        self.peaks, self._phase, self._live = {}, None, None
        on_gpu = self.device.type == "cuda"
        parts = any(hasattr(parameter, "_local_tensor") for parameter in self.model.parameters())
        wanted = self.mode == "always" or (self.mode == "auto" and (on_gpu or number < CPU_STEPS))
        if wanted and parts and not on_gpu:
            wanted = False  # what a base that is shared out gathers and lets go of, no dispatch mode sees
        if wanted and not on_gpu:
            self._live = LiveBytes([*self.model.parameters(), *self.model.buffers(), *others])
        self._on = wanted
        with self._live or nullcontext():
            yield
        self("end")
        self._on = False

    def __call__(self, phase: str) -> None:
        """Begin `phase`; the one before it ends here."""
        if not self._on:
            return
        if self._phase is not None:
            peak = self._live.peak if self._live is not None else torch.cuda.max_memory_allocated(self.device)
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0))
        if self._live is not None:
            self._live.peak = self._live.bytes
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._phase = None if phase == "end" else phase

    def metrics(self) -> dict[str, float]:
        """Return the peaks under the names `memory/<phase>_peak_bytes`."""
        return {f"memory/{phase}_peak_bytes": peak for phase, peak in self.peaks.items()}
