"""The state of every source of random numbers, as tensors and plain values."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def capture(generators: Mapping[str, torch.Generator]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch (every device), numpy, Python and the named generators: tensors, and what JSON can hold."""
    tensors = {f"generator.{name}": generator.get_state() for name, generator in generators.items()}
    tensors["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    found = numpy.random.get_state(legacy=False)
    tensors["numpy"] = torch.from_numpy(found["state"]["key"].astype("int64"))
    others = [found["bit_generator"], found["state"]["pos"], found["has_gauss"], found["gauss"]]
    return tensors, {"numpy": others, "python": random.getstate()}


def restore(tensors: Mapping[str, Tensor], values: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Bring every source back to what `capture` returned; a GPU that is not there any more is left out."""
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator.{name}"])
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if (state := tensors.get(f"cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    name, place, has_gauss, gauss = values["numpy"]
    numpy.random.set_state((name, tensors["numpy"].numpy().astype("uint32"), place, has_gauss, gauss))
    version, state, gauss = values["python"]
    random.setstate((version, tuple(state), gauss))


@contextmanager
def kept() -> Iterator[None]:
    """Bring the global sources back to what they were before the block, whatever it drew."""
    before = capture({})
    try:
        yield
    finally:
        restore(*before, {})
