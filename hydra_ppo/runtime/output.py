"""What a run prints, which never ends it: a terminal that is gone, a pipe that nobody reads, a full disk, a narrow alphabet."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class _Lossy:
    """A text stream that drops what it cannot write. All else is that of the stream inside."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, in other letters where the stream has not those; return its length."""
        with suppress(OSError, ValueError):  # ValueError: a closed stream
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode(self._stream.encoding, "backslashreplace").decode(self._stream.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def as_typed(path: Path | str) -> str:
    """Return a path as a shell and this program read it: quoted, and not like an option."""
    name = str(path)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


@contextmanager
def without_input() -> Iterator[None]:
    """Let nothing inside the block wait for somebody to type: libraries ask whether to run code that comes with a model."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


@contextmanager
def losing_output() -> Iterator[None]:
    """Let no write to standard output or error raise inside the block, nor when the process ends after it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lossy(before[0]), _Lossy(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            finish(stream)


def finish(stream: Any) -> OSError | None:
    """Flush a stream; where that fails, let the flush at the end of the process go nowhere, and return the error."""
    try:
        stream.flush()
    except ValueError:  # closed
        return None
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def settle_output() -> None:
    """Let standard output and error be there, and write letters that they do not have as escapes instead of raising."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would have its number, and what is printed in it
            with suppress(OSError):
                while os.open(os.devnull, os.O_RDWR) < number:
                    pass
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115  # for good
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
