"""Opens a source of rows: JSONL, JSON, CSV, Parquet, a hub dataset or any iterable of dicts."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra_ppo.errors import DataError

DataSource = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_HUB_NAME = re.compile(r"([\w-]+|[\w-][\w.-]*/[\w.-]+)(:[\w.-]+)?")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
_LONGEST_CELL = 2**31 - 1
"""Characters; Python's csv takes 131,072 where nothing else is said."""


class Rejected(Exception):
    """A row that cannot be used; one that is not malformed is dropped without an error.

    Args:
        missing: the column that it lacks, where that is the reason.
    """

    def __init__(self, reason: str, *, malformed: bool = True, missing: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.malformed = malformed
        self.missing = missing


@dataclass(frozen=True)
class Source:
    """A source being read: rows with their numbers, a row that could not be decoded as a `Rejected`."""

    name: str
    unit: Literal["line", "row"]
    rows: Iterator[tuple[int, Any]]


def open_source(source: DataSource | Source, split: str) -> Source:
    """Open a file, dataset folder, hub dataset (`name` or `name:config`) or iterable; raises DataError where that fails.

    What is open already stays as it is.
    """
    if isinstance(source, Source):
        return source
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise DataError(f"source={source!r} holds no rows; give a file, a hub dataset or an iterable of dicts.")
        return Source("examples", "row", enumerate(source, 1))
    name = os.fspath(source)
    path = local_path(name)
    if not name or not exists(path):
        if not is_hub_name(name):
            several = ", or put the rows of several files into one" if "," in name else ""
            raise DataError(f"{name or repr(name)}: no such file; check the path{several}.")
        hub_path, _, config = name.partition(":")
        return Source(name, "row", enumerate(_read_dataset(name, hub_path, config or None, split), 1))
    if path.is_dir():
        return Source(name, "row", enumerate(_read_dataset(name, str(path), None, split), 1))
    if not path.is_file():
        raise DataError(f"{name}: is not a regular file; write the rows into one.")
    if path.suffix == ".jsonl":
        return Source(name, "line", _read_jsonl(name, path))
    if path.suffix == ".csv":
        return Source(name, "line", _read_csv(name, path))
    if path.suffix in FILE_TYPES:
        read = _read_json if path.suffix == ".json" else _read_parquet
        return Source(name, "row", enumerate(read(name, path), 1))
    types = f"{', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}"
    raise DataError(f"{name}: files of type {path.suffix!r} are not supported; use {types}.")


def is_hub_name(source: str) -> bool:
    """Say whether a source can only be a dataset of the hub: no file or folder, and not named like a file."""
    path = local_path(source)
    return not exists(path) and path.suffix not in FILE_TYPES and _HUB_NAME.fullmatch(source) is not None


def local_path(name: str) -> Path:
    """Return the path that a name stands for; `~` of a user that is not known stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(path: Path) -> bool:
    """Say whether there is such a file or folder; what no file can be called is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be read ({one_line(error)}); check or rewrite the file.")


def one_line(error: Exception) -> str:
    """Return type and message of an exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _not_utf8(name: str, line: int) -> DataError:
    return DataError(f"{name}: line {line} is not valid UTF-8; save the file as UTF-8.")


def _read_jsonl(name: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            for number, text in enumerate(_lines(name, file), 1):
                if text.strip():
                    yield number, _parse_json(text)
    except OSError as error:
        raise _unreadable(name, error) from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for integers of thousands of digits
        return Rejected("not valid JSON")


def _read_json(name: str, path: Path) -> Iterator[Any]:
    try:
        content = path.read_bytes()
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(name, content.count(b"\n", 0, error.start) + 1) from None
    except OSError as error:
        raise _unreadable(name, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: is not valid JSON ({one_line(error)}); fix it, or name it .jsonl if it holds one object per line."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{name}: does not hold a list; write a list of objects, or one object per line in a .jsonl file.")
    yield from rows


def _read_csv(name: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Read comma-separated rows under a header; yield them with the line that each begins at."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    try:
        with path.open("rb") as file:
            # Without `strict`, a quote that nothing closes takes the rest of the file into one cell.
            rows = csv.reader(_lines(name, file), strict=True)
            header = next(rows, [])
            if twice := next((column for i, column in enumerate(header) if column in header[:i]), None):
                raise DataError(f"{name}: has two columns {twice!r}; give each its own name.")
            line = rows.line_num + 1
            for cells in rows:
                if cells and len(cells) != len(header):
                    yield line, Rejected(f"{len(cells)} cells under a header of {len(header)}")
                elif cells:
                    yield line, dict(zip(header, cells, strict=True))
                line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}: line {rows.line_num} is not CSV ({error}); put cells with commas or quotes in quotes."
        ) from None
    except OSError as error:
        raise _unreadable(name, error) from error


def _lines(name: str, file: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _not_utf8(name, number) from None


def _read_parquet(name: str, path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # All columns: those that are not read are handed to reward functions.
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a time that Python cannot hold
        raise _unreadable(name, error) from error


def _read_dataset(name: str, path: str, config: str | None, split: str) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(path, config, split=split)
    except Exception as error:  # what the hub client, the builders and the readers raise has no common base
        raise DataError(
            f"{name}: cannot be loaded as a dataset with split {split!r} ({one_line(error)}); "
            "check the path or name, the split and the connection."
        ) from error
