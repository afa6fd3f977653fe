"""What all tensors that are not computed share: anything they do not know they do on the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALIASES = {"axis": "dim", "keepdims": "keepdim"}

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""By torch function, what to do when a lazy tensor is among the arguments."""


class Lazy:
    """Stands for a real tensor that `materialize(why)` would compute."""

    def materialize(self, why: str = "materialize") -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.materialize(name), name)

    def __add__(self, other: Any) -> Tensor:
        return self.materialize("addition") + real(other, "addition")

    def __sub__(self, other: Any) -> Tensor:
        return self.materialize("subtraction") - real(other, "subtraction")

    def __rsub__(self, other: Any) -> Tensor:
        return real(other, "subtraction") - self.materialize("subtraction")

    def __mul__(self, factor: Any) -> Any:
        return self.materialize("multiplication") * real(factor, "multiplication")

    def __truediv__(self, divisor: Any) -> Any:
        return self.materialize("division") / real(divisor, "division")

    def __eq__(self, other: object) -> Any:
        return self.materialize("comparison") == real(other, "comparison")

    def __ne__(self, other: object) -> Any:
        return self.materialize("comparison") != real(other, "comparison")

    def __neg__(self) -> Tensor:
        return -self.materialize("negation")

    __hash__ = object.__hash__
    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            # torch takes numpy's names too, and its first argument by name.
            named = {ALIASES.get(name, name): value for name, value in kwargs.items()}
            first = (named.pop("input"),) if "input" in named and not args else args
            found = handler(*first, **named)
            if found is not NotImplemented:
                return found
        name = getattr(func, "__name__", str(func))
        return func(*real(args, name), **real(kwargs, name))


def left_of_vocabulary(index: Any, ndim: int) -> tuple[tuple[Any, ...], bool]:
    """Return `index` as a tuple, less a slice over the whole vocabulary at its end, and whether it leaves that alone."""
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) == ndim and isinstance(parts[-1], slice) and parts[-1] == slice(None):
        parts = parts[:-1]
    plain = all(part is not Ellipsis and part is not None for part in parts)
    used = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
    return parts, plain and used < ndim


def real(value: Any, why: str) -> Any:
    """Replace lazy tensors inside `value` by real ones."""
    if isinstance(value, Lazy):
        return value.materialize(why)
    if isinstance(value, tuple | list):
        return type(value)(real(item, why) for item in value)
    if isinstance(value, dict):
        return {name: real(item, why) for name, item in value.items()}
    return value
