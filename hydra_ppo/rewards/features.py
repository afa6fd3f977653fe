"""States of preference pairs on disk: written block by block, read by memory map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.model.origin import Origin
from hydra_ppo.runtime.files import irregular, read_regular, write_whole

ABOUT, PROGRESS = "features.json", "progress.json"
STATES, MEANS, PAIRS, ROWS = "states.npy", "means.npy", "pairs.npy", "rows.jsonl"
FORMAT = 1
GROUP, CHOSEN, REJECTED, LABELLED = range(4)
"""Columns of pairs.npy: number of the prompt, tokens of each answer, and whether the order of the two is a label."""


@dataclass(frozen=True)
class Features:
    """Stored states of N pairs.

    Attributes:
        folder: where they lie.
        about: what features.json says.
        origin: what they came of.
        states: (N, 2, H) fp16, chosen and rejected, memory-mapped.
        means: (N, 2, H) fp16 over the tokens of each answer; None where they were not asked for.
        pairs: (N, 4) int32, see `LABELLED`.

    Memory: none but of what is read; 4 H bytes of a pair on disk, 8 H with means.
    """

    folder: Path
    about: dict[str, Any]
    origin: Origin
    states: np.ndarray
    means: np.ndarray | None
    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    def labelled(self) -> list[int]:
        """Return the numbers of the pairs whose order is a label."""
        return np.flatnonzero(self.pairs[:, LABELLED]).tolist()

    def rows(self) -> list[dict[str, Any]]:
        """Return the pairs as they came, one dict each."""
        with (self.folder / ROWS).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def read_pairs(states: np.ndarray, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return fp32 states (n, H) of the chosen and of the rejected answers of some pairs."""
    found = torch.from_numpy(np.asarray(states[np.asarray(rows, dtype=np.int64)], dtype=np.float32))
    return found[:, 0], found[:, 1]


def open_features(folder: Path) -> Features:
    """Open what `FeatureWriter` wrote.

    Raises:
        ConfigError: where the folder is none of it, or not whole.
    """
    place = f"features={str(folder)!r}"
    if (folder / PROGRESS).is_file() and not (folder / ABOUT).is_file():
        raise ConfigError(f"{place} is not whole; run the same hydra-ppo features again, which goes on with it.")
    if not (folder / ABOUT).is_file():
        raise ConfigError(f"{place} holds no {ABOUT}; name a folder that hydra-ppo features wrote.")
    if (strange := irregular(folder)) is not None:
        raise ConfigError(f"{place} holds {strange!r}, which is neither file nor folder; remove it.")
    try:
        about = json.loads(read_regular(folder / ABOUT))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"{ABOUT} is not of this version")
        origin, count = Origin.read(about.get("origin"), place), about.get("pairs")
        shape = (count, 2, origin.hidden_size)
        states = _opened(folder / STATES, shape, np.float16)
        means = _opened(folder / MEANS, shape, np.float16) if about.get("means") else None
        pairs = np.array(_opened(folder / PAIRS, (count, 4), np.int32))
    except (OSError, ValueError, EOFError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} cannot be read ({' '.join(str(error).split())[:160]}); make them again.") from error
    return Features(folder, about, origin, states, means, pairs)


def _opened(path: Path, shape: tuple[Any, ...], dtype: type) -> np.ndarray:
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{path.name} is {found.dtype} {found.shape}, not {np.dtype(dtype)} {shape}")
    return found


class FeatureWriter:
    """Writes states of pairs, so that a folder looks whole only when it is, and one that is not can be gone on with.

    features.json comes last; until then progress.json says how many pairs are on disk, and of what.

    Args:
        folder: new, empty, or begun by the same call.
        identity: what decides the numbers: origin, digest of the rows, settings. A folder begun with another is refused.
        pairs: (N, 4), see `LABELLED`.
        rows: as they came, kept beside the states.
        hidden: H.
        means: whether means are stored too.

    Attributes:
        done: pairs that are on disk.

    Raises:
        ConfigError: where the folder holds anything else.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        pairs: np.ndarray,
        rows: Sequence[Mapping[str, Any]],
        hidden: int,
        means: bool,
    ) -> None:
        self.folder, self.identity, self.count = folder, dict(identity), len(pairs)
        check_output(folder)
        self.done = self._begun()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.done == 0:
                np.save(folder / PAIRS, pairs.astype(np.int32), allow_pickle=False)
                with (folder / ROWS).open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            mode, shape = "r+" if self.done else "w+", (len(pairs), 2, hidden)
            names = [STATES, *([MEANS] if means else [])]
            files = [np.lib.format.open_memmap(folder / n, mode=mode, dtype=np.float16, shape=shape) for n in names]
            self._mark(self.done)
        except OSError as error:
            raise ConfigError(
                f"output={str(folder)!r} cannot be written ({error.strerror}); make room, or choose another folder."
            ) from error
        self.states, self.means = files[0], files[1] if means else None

    def _begun(self) -> int:
        path = self.folder / PROGRESS
        if not path.is_file():
            return 0
        try:
            found = json.loads(read_regular(path))
            done, before = int(found["done"]), found["identity"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0
        if before != json.loads(json.dumps(self.identity)):
            raise ConfigError(
                f"output={str(self.folder)!r} was begun with another model, other data or other settings; remove it, or choose "
                "another folder."
            )
        return done if all((self.folder / name).is_file() for name in (STATES, PAIRS, ROWS)) else 0

    def _mark(self, done: int) -> None:
        write_whole(self.folder / PROGRESS, json.dumps({"done": done, "identity": self.identity}))

    def add(self, ends: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor] | None) -> None:
        """Store the states of the next n pairs, (n, H) of the chosen and of the rejected answers.

        Raises:
            NonFiniteError: where a state is not finite in fp16.
        """
        rows = slice(self.done, self.done + len(ends[0]))
        for file, pair in ((self.states, ends), (self.means, means)):
            if file is not None and pair is not None:
                found = torch.stack(pair, dim=1).to(torch.float16)
                if not found.isfinite().all():
                    raise NonFiniteError(
                        f"a state of pairs {rows.start} to {rows.stop - 1} is not finite in fp16; see model.dtype."
                    )
                file[rows] = found.cpu().numpy()
                file.flush()
        self.done = rows.stop
        self._mark(self.done)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Say that all is there, and what it is."""
        assert self.done == self.count
        whole = {"format": FORMAT, "pairs": self.count, "means": self.means is not None, **about}
        write_whole(self.folder / ABOUT, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        (self.folder / PROGRESS).unlink()


def check_output(folder: Path) -> None:
    """Refuse a folder that holds what is not features that were begun.

    Raises:
        ConfigError: naming it.
    """
    if (folder / ABOUT).exists():
        raise ConfigError(f"output={str(folder)!r} holds features already; choose another folder, or remove it.")
    known = {PROGRESS, f"{PROGRESS}.partial", STATES, MEANS, PAIRS, ROWS, f"{ABOUT}.partial"}
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - known)):
        raise ConfigError(f"output={str(folder)!r} holds {others[0]!r} already; choose another folder.")
