"""What the workers share: commands come in on stdin, a JSON line goes out for each. `processes.py` is the other end."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from workloads import Workload

PACKAGES = ("hydra-ppo", "trl", "torch", "transformers", "peft", "accelerate")


class Session:
    """Carries out `update`, `measure` and `quit`: the worker calls `begin` before an update and `end` after it.

    Attributes:
        workload, dtype, options: what to build.
        updates: that the driver may ask for, warm-up, repeated and measured ones included.
    """

    def __init__(self) -> None:
        spec = json.loads(sys.argv[1])
        self.name: str = spec["name"]
        self.workload = Workload(**spec["workload"])
        self.dtype: str = spec["dtype"]
        self.options: dict[str, Any] = spec["options"]
        self.updates: int = spec["updates"]
        self._live_bytes = _with_least(_load(spec["memory_module"]).LiveBytes)
        self._begun = 0
        self._bytes: dict[str, int] = {}
        self._live: Any = None
        self._started = 0.0
        # What libraries print must not get between the answers.
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the base's weights."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def begin(self) -> None:
        """Wait for a command and start the clock, or leave the program."""
        if not self._begun:
            self._answer({"ready": True})
        command = sys.stdin.readline().strip()
        if not command:  # the driver is gone
            sys.exit()
        if command == "quit":
            self._answer(self._report())
            sys.exit()
        if self._begun == self.updates:
            raise RuntimeError(f"updates={self.updates} were announced and are used up; announce more.")
        self._begun += 1
        if command == "measure":
            gc.collect()
            self._live = self._live_bytes(_tensors())
            self._live.__enter__()
        self._started = time.perf_counter()

    def end(self, **found: Any) -> None:
        """Stop the clock and answer; `found` is what the worker itself measured and goes into the answer of an `update`."""
        seconds = time.perf_counter() - self._started
        if self._live is None:
            self._answer({"seconds": seconds, **found})
        else:
            self._live.__exit__(None, None, None)
            self._bytes = {"peak_bytes": self._live.peak, "static_bytes": self._live.least}
            self._live = None
            self._answer(self._bytes)

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Raise where a response does not have the length (tokens) that the workload gives it."""
        if wrong := set(lengths) - {self.workload.response_tokens}:
            raise RuntimeError(
                f"response_tokens={self.workload.response_tokens}, but {self.name} sampled {sorted(wrong)}; "
                "the contestants no longer do the same work, find what ends its responses."
            )

    def _report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "workload": self.workload.name,
            "dtype": self.dtype,
            **self._bytes,
            "versions": {"python": platform.python_version(), **_versions()},
        }

    def _answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def _load(path: str) -> Any:
    """Import a module of the package by its file: the package itself does not import in every environment."""
    spec = importlib.util.spec_from_file_location("hydra_ppo_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_least(live_bytes: Any) -> Any:
    """Return the counter with one number more: the fewest bytes alive at once.

    That is what stays, whatever an update does: models, adapters, optimizer state. A count before the update would not do,
    for a trainer may still hold its last rollout then.
    """

    class Counter(live_bytes):
        least = sys.maxsize

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self.least = min(self.least, self.bytes)
            return result

    return Counter


def _tensors() -> list[torch.Tensor]:
    """Return the tensors that are alive already: models, optimizer state, and what a trainer keeps from its last update."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return found + [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
