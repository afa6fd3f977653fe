"""What was measured, as plain data: capture writes it, reports read it, a file keeps it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra_ppo.errors import DataError

KINDS = (
    *("base weights", "adapters", "heads", "gradients", "optimizer"),
    *("kv cache", "activations", "dequantised weights", "rollout copies", "log-probs"),
    *("experience", "other", "gathered layers"),
)
"""What a tensor is for. `dequantised weights` are copies of a 4- or 8-bit layer in the compute type, alive for one
multiplication; `rollout copies` are what decoding multiplies with, where it is not the base itself; `gathered layers` are whole
ones of a base that several processes share out; `other` is what could not be attributed."""
GATHERED = "gathered layers"

PHASES = ("load", "rollout", "score", "update-actor", "update-critic", "optimizer")

SHARED = "shared"
"""Role of what belongs to no single role: the base of Hydra, the experience."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
"""Those whose versions a measurement depends on, beside Python's."""


def versions(*others: str) -> dict[str, str | None]:
    """Return the versions of Python, of `PACKAGES` and of others; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*PACKAGES, *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


FORMAT = 1


@dataclass(frozen=True)
class LiveTensor:
    """One storage that was alive at a peak.

    Attributes:
        bytes: of the whole storage.
        shape, dtype: of the tensor through which it was first seen.
        kind, role: what it is for.
        phase: in which it was made.
        operation: that made it.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    kind: str
    role: str
    phase: str
    operation: str


@dataclass(frozen=True)
class Peak:
    """The moment of a phase at which most bytes were alive.

    Attributes:
        by_role: bytes by role and kind; all of them add up to `bytes`.
        largest: the biggest storages of that moment besides the base's weights, biggest first.
    """

    bytes: int
    by_role: dict[str, dict[str, int]]
    largest: list[LiveTensor] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind, in the order of `KINDS`; kinds without any are left out."""
        totals = dict.fromkeys(KINDS, 0)
        for kinds in self.by_role.values():
            for kind, size in kinds.items():
                totals[kind] += size
        return {kind: size for kind, size in totals.items() if size}


@dataclass(frozen=True)
class Timeline:
    """Live bytes over a run, thinned out: of each stretch of events the moment with most bytes.

    Attributes:
        kinds: for each kind, bytes at every sample; all lists have the same length.
        phases: (phase, index of its first sample), in order; a phase may come more than once.
    """

    kinds: dict[str, list[int]]
    phases: list[tuple[str, int]]


@dataclass(frozen=True)
class Profile:
    """One method on one model, measured or simulated.

    Attributes:
        method: full, lora, dlora, j-hydra or hydra.
        settings: model, lengths, batch sizes and everything else that was chosen, as the user would write it.
        simulated: whether the tensors were fake.
        device: the real device; "cpu" for a simulation.
        static_bytes: weights of all bases, adapters and heads.
        floor_bytes: static_bytes with what a step must hold at once by its settings: the largest set of gradients (in-turn one
            role's, else all), and the optimizer state that is on the device in the updates.
        phases: peak by phase, in the order in which they came.
        timeline: None where it was not kept.
        allocator: on CUDA, `max_memory_allocated` and `max_memory_reserved` by phase; else None.
        responses_per_second: of real runs, measured without the tracker; else None.
        seconds: that the capture took.
        host_bytes: most bytes that were kept in the host's memory to spare the device; no part of the phases.
    """

    method: str
    settings: dict[str, Any]
    simulated: bool
    device: str
    static_bytes: int
    floor_bytes: int
    phases: dict[str, Peak]
    timeline: Timeline | None = None
    allocator: dict[str, dict[str, int]] | None = None
    responses_per_second: float | None = None
    seconds: float = 0.0
    host_bytes: int = 0

    @property
    def peak_phase(self) -> str:
        """Phase, from rollout on, with the highest peak; loading happens once and is left out where there is another."""
        steps = [phase for phase in self.phases if phase != "load"] or list(self.phases)
        return max(steps, key=lambda phase: self.phases[phase].bytes)

    @property
    def peak(self) -> Peak:
        """The peak of `peak_phase`."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once in a PPO step."""
        return self.peak.bytes

    def summary(self) -> dict[str, Any]:
        """Return the numbers that `--json` prints: bytes all of them but responses_per_second and seconds."""
        return {
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "floor_bytes": self.floor_bytes,
            "static_bytes": self.static_bytes,
            "host_bytes": self.host_bytes,
            "phases": {phase: peak.bytes for phase, peak in self.phases.items()},
            "kinds": self.peak.kinds,
            "roles": {role: sum(kinds.values()) for role, kinds in self.peak.by_role.items()},
            "phase_kinds": {phase: peak.kinds for phase, peak in self.phases.items()},
            "allocator": self.allocator,
            "responses_per_second": self.responses_per_second,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Record:
    """What one `hydra-ppo profile` measured, and on what software.

    Attributes:
        profiles: one per method, in the order in which they were asked for.
        versions: of Python, torch, transformers, peft, bitsandbytes.
    """

    profiles: list[Profile]
    versions: dict[str, str | None]

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            DataError: when the file is not such a record.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data["format"]
            if found == FORMAT:
                return Record([_profile(item) for item in data["profiles"]], data["versions"])
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; name a file that hydra-ppo profile wrote.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a record of hydra-ppo profile ({error}); measure again.") from error
        raise DataError(f"{path}: format={found!r} is not {FORMAT}; measure again with this version.")


def _profile(data: dict[str, Any]) -> Profile:
    phases = {
        name: Peak(
            peak["bytes"],
            peak["by_role"],
            [LiveTensor(**(tensor | {"shape": tuple(tensor["shape"])})) for tensor in peak["largest"]],
        )
        for name, peak in data["phases"].items()
    }
    timeline = data["timeline"]
    if timeline is not None:
        timeline = Timeline(timeline["kinds"], [(phase, first) for phase, first in timeline["phases"]])
    return Profile(**(data | {"phases": phases, "timeline": timeline}))
