"""Files that must survive a power cut, a kill at any moment and a full disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of a file that is being written, until it is whole."""


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one move, so that nobody ever finds half of it; what was there stays until then.

    Raises:
        OSError: with the name of the file, and nothing half-written left.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def irregular(folder: Path) -> str | None:
    """Return the name of a folder's first entry that is neither file nor folder: reading a pipe or device may never end."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing, which whoever reads it says
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return path.name
    return None


LONGEST_TEXT = 64 * 2**20
"""Bytes of a config or manifest that are read: real ones have some thousand, tokenizers some million."""


def read_regular(path: Path) -> str:
    """Return the text of a regular file of no absurd size. A pipe or device, which could be read for ever, is refused.

    Raises:
        OSError: with the reason.
        ValueError: where it is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path.name} is not a regular file")
    if status.st_size > LONGEST_TEXT:
        raise OSError(f"{path.name} has {status.st_size:,} bytes, more than the {LONGEST_TEXT:,} that are read")
    return path.read_text(encoding="utf-8")
