"""Says whether others used the processor while something was timed, from Linux's own accounts under /proc."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

LIMIT = 0.05
"""Share of the machine's processor time beyond which others, or the machine's host, disturb."""

GRAIN = 4
"""Ticks (hundredths of a second) that say nothing: processor time is accounted in whole ones, per core."""

REPEATS = 3
"""Times that a disturbed turn is taken again."""

PROC = Path("/proc")

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """Ticks since the machine, or the process, started.

    Attributes:
        total: of all cores, idle ones included.
        busy: in which a core did work.
        steal: in which the host of a virtual machine gave its core to someone else.
        own: of the process watched.
    """

    total: int
    busy: int
    steal: int
    own: int


@dataclass(frozen=True)
class Load:
    """What happened between two readings.

    Attributes:
        others: share of the machine's processor time that other processes used.
        steal: share that was stolen.
        disturbed: whether either is more than `LIMIT`.
    """

    others: float
    steal: float
    disturbed: bool


def machine_ticks(text: str) -> tuple[int, int, int]:
    """Return total, busy and stolen ticks of all cores from the text of /proc/stat."""
    fields = next(line for line in text.splitlines() if line.startswith("cpu ")).split()[1:]
    user, nice, system, idle, waiting, interrupts, soft, steal = (int(field) for field in fields[:8])
    busy = user + nice + system + interrupts + soft  # guests are in user already
    return busy + idle + waiting + steal, busy, steal


def process_ticks(text: str) -> int:
    """Return user and system ticks of a process from the text of /proc/PID/stat, all threads together."""
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return int(fields[11]) + int(fields[12])


def read(pid: int, proc: Path = PROC) -> Reading | None:
    """Return the ticks of now; None where the system does not keep such accounts."""
    try:
        machine = (proc / "stat").read_text(encoding="utf-8")
        process = (proc / str(pid) / "stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return Reading(*machine_ticks(machine), process_ticks(process))


def between(before: Reading, after: Reading) -> Load:
    """Return the load from one reading to the next."""
    total = after.total - before.total
    others = max(0, (after.busy - before.busy) - (after.own - before.own))
    steal = after.steal - before.steal
    disturbed = max(others, steal) > max(LIMIT * total, GRAIN)
    return Load(others / max(total, 1), steal / max(total, 1), disturbed)


def undisturbed(
    turn: Callable[[], T], pid: int, say: Callable[[str], None] = lambda line: None, proc: Path = PROC
) -> tuple[T, Load | None]:
    """Take a turn, again while others disturb it, up to `REPEATS` times; return what the last one gave and its load.

    Args:
        turn: what to do.
        pid: of the process that does it.
        say: told why a turn is taken again.
    """
    for left in reversed(range(REPEATS + 1)):
        before = read(pid, proc)
        found = turn()
        after = read(pid, proc)
        load = None if before is None or after is None else between(before, after)
        if load is None or not load.disturbed or not left:
            break
        say(f"once more: others used {load.others:.0%} of the machine, {load.steal:.0%} was stolen")
    return found, load
