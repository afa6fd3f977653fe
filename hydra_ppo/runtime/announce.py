"""Says what is being allocated, to whoever measures memory; nobody listens otherwise, and it costs nothing worth counting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

HOST = "host memory"
"""The kind of what `host_tensors` makes: it is no part of what the device holds."""

_kinds: list[str] = []


@contextmanager
def allocating(kind: str) -> Iterator[None]:
    """Announce that tensors made inside the block are of this kind; the innermost block counts."""
    _kinds.append(kind)
    try:
        yield
    finally:
        _kinds.pop()


def allocated_kind() -> str | None:
    """Return the kind that is announced at the moment, or None."""
    return _kinds[-1] if _kinds else None
