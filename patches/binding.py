"""Replaces attributes of a host and puts every one of them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

_ABSENT = object()


class Bindings:
    """Attributes that were replaced, in order."""

    def __init__(self) -> None:
        self._records: list[tuple[Any, str, Any, Any]] = []  # owner, name, what it held itself, what it holds now

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` to `value` and remember what stood there."""
        self._records.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, last first; what somebody else has replaced since is left to them."""
        while self._records:
            owner, name, before, ours = self._records.pop()
            if vars(owner).get(name, _ABSENT) is not ours:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


_installed: dict[str, tuple[int, Bindings]] = {}


def install(host: str, bind: Any) -> None:
    """Run `bind(bindings)` for `host`, unless it is in force already; each call needs one `uninstall`."""
    count, bindings = _installed.get(host, (0, None))
    if bindings is None:
        bindings = Bindings()
        try:
            bind(bindings)
        except BaseException:
            bindings.undo()
            raise
    _installed[host] = (count + 1, bindings)


def uninstall(host: str) -> None:
    """Take one `install` back; the last one undoes the patch."""
    count, bindings = _installed[host]
    if count > 1:
        _installed[host] = (count - 1, bindings)
    else:
        del _installed[host]
        bindings.undo()


class Applied(Mapping[str, Any]):
    """The host's keyword arguments, `Trainer(..., **applied)`; undoes the patch when its block ends, or by `undo()`."""

    def __init__(self, host: str, arguments: Mapping[str, Any]) -> None:
        self._host: str | None = host
        self._arguments = dict(arguments)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def undo(self) -> None:
        """Leave the host as it was found. A second call does nothing."""
        host, self._host = self._host, None
        if host is not None:
            uninstall(host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
