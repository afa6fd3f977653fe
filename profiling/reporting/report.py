"""Tables of what was measured: by method, by phase, by role, and the largest storages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.measuring.record import KINDS, Profile, Record
from hydra_ppo.runtime.tables import print_table

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
ALLOCATOR_ROWS = {"max_memory_allocated": "allocator: allocated", "max_memory_reserved": "allocator: reserved"}
NOT_MEASURED = "-"


def unit_for(sizes: Iterable[int]) -> tuple[str, int]:
    """Return name and bytes of the largest unit that the largest of `sizes` (bytes) fills, KiB at least."""
    largest = max(sizes, default=0)
    return next((unit for unit in UNITS if largest >= unit[1]), UNITS[-1])


def format_count(number: int) -> str:
    """Return a number of parameters for people: 8.0 B, 494 M."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M" if number >= 1e6 else str(number)


def format_bytes(size: int) -> str:
    """Return `size` (bytes) as text with its unit, such as "6.3 GiB"."""
    name, unit = unit_for([size])
    return f"{size / unit:,.1f} {name}"


def source(profile: Profile) -> str:
    """Return "simulated", or "measured on" and the device."""
    return "simulated" if profile.simulated else f"measured on {profile.device}"


def kinds_at_peak(profile: Profile, phase: str) -> dict[str, int]:
    """Return bytes by kind at the peak of `phase`, in the order of `KINDS`.

    Raises:
        DataError: when the phase was not measured, or its kinds do not add up to its bytes.
    """
    if phase not in profile.phases:
        raise DataError(f"phase={phase} was not measured for {profile.method}; choose one of {', '.join(profile.phases)}.")
    peak = profile.phases[phase]
    unknown = {kind for kinds in peak.by_role.values() for kind in kinds} - set(KINDS)
    if unknown:
        raise DataError(f"kind={min(unknown)} of {profile.method}, {phase}, is not one of {', '.join(KINDS)}; measure again.")
    total = sum(peak.kinds.values())
    if total != peak.bytes:
        raise DataError(
            f"bytes={peak.bytes} of {profile.method}, {phase}, is not the sum of its kinds, {total}; measure again."
        )
    return peak.kinds


def summary_line(profile: Profile) -> str:
    """Return one sentence: peak, floor and static memory, what the host keeps if anything, responses per second if measured."""
    ratio = f"{profile.peak_bytes / profile.floor_bytes:.2f} times the floor" if profile.floor_bytes else "floor"
    speed = "" if profile.responses_per_second is None else f"; {profile.responses_per_second:,.2f} responses/s"
    host = f"; {format_bytes(profile.host_bytes)} in host memory" if profile.host_bytes else ""
    return (
        f"{profile.method}, {source(profile)}: peak {format_bytes(profile.peak_bytes)} in {profile.peak_phase}, "
        f"{ratio} of {format_bytes(profile.floor_bytes)}; static {format_bytes(profile.static_bytes)}{host}{speed}."
    )


def comparison_table(profiles: Sequence[Profile]) -> Table:
    """Return one row per method: memory in one unit, ratios, and responses per second where one was measured.

    Raises:
        DataError: when there is no profile.
    """
    if not profiles:
        raise DataError("profiles=[] leaves nothing to compare; measure at least one method.")
    name, unit = unit_for(size for profile in profiles for size in (profile.peak_bytes, profile.floor_bytes))
    sources = [source(profile) for profile in profiles]
    full = next((profile for profile in profiles if profile.method == "full"), None)

    def ratio(above: int, below: int) -> str:
        return f"{above / below:.2f}" if below else NOT_MEASURED

    columns = {
        "method": [profile.method for profile in profiles],
        "source": sources if len(set(sources)) > 1 else [],
        "static": [_size(profile.static_bytes, unit) for profile in profiles],
        "floor": [_size(profile.floor_bytes, unit) for profile in profiles],
        "peak": [_size(profile.peak_bytes, unit) for profile in profiles],
        "phase of the peak": [profile.peak_phase for profile in profiles],
        "peak / floor": [ratio(profile.peak_bytes, profile.floor_bytes) for profile in profiles],
        "x smaller than full": [ratio(full.peak_bytes, profile.peak_bytes) for profile in profiles] if full else [],
        "responses per second": [
            NOT_MEASURED if profile.responses_per_second is None else f"{profile.responses_per_second:,.2f}"
            for profile in profiles
        ],
    }
    columns = {header: cells for header, cells in columns.items() if set(cells) - {NOT_MEASURED}}
    where = "" if "source" in columns else f", {sources[0]}"
    table = _table(f"Memory of one PPO step{where}, {name}")
    for header in columns:
        table.add_column(Text(header), justify="left" if header in ("method", "source", "phase of the peak") else "right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return _keep_words(table)


def phase_table(profile: Profile) -> Table:
    """Return memory by kind (rows) at the peak of each phase (columns), with totals, in one unit.

    Where the CUDA allocator was read, what it counted follows below the totals.

    Raises:
        DataError: when the kinds of a phase do not add up to its bytes.
    """
    kinds = {phase: kinds_at_peak(profile, phase) for phase in profile.phases}
    totals = {phase: peak.bytes for phase, peak in profile.phases.items()}
    allocator = profile.allocator or {}
    allocated = {
        label: [allocator.get(phase, {}).get(key) for phase in profile.phases] for key, label in ALLOCATOR_ROWS.items()
    }
    name, unit = unit_for([*totals.values(), *(size or 0 for sizes in allocated.values() for size in sizes)])
    table = _table(f"{profile.method}, {source(profile)}: peak of each phase, {name}")
    table.add_column(Text("kind"))
    for phase in profile.phases:
        mark = "\n(peak)" if phase == profile.peak_phase else ""
        table.add_column(Text(phase.replace("-", "-\n") + mark), justify="right")  # broken, to fit 80 columns
    for kind in KINDS:
        if any(kind in present for present in kinds.values()):
            table.add_row(Text(kind), *(Text(_size(present.get(kind, 0), unit)) for present in kinds.values()))
    _add_total(table, [_size(size, unit) for size in totals.values()])
    if profile.allocator is not None:
        for label, sizes in allocated.items():
            table.add_row(Text(label), *(Text(_size(size, unit)) for size in sizes))
    return _keep_words(table)


def role_table(profile: Profile) -> Table:
    """Return memory by role (rows) and kind (columns) at the peak of the step, with totals, in one unit.

    Raises:
        DataError: when the kinds do not add up to the bytes of the peak.
    """
    kinds = kinds_at_peak(profile, profile.peak_phase)
    name, unit = unit_for([profile.peak_bytes])
    table = _table(f"{profile.method}, {source(profile)}: roles at the peak, {profile.peak_phase}, {name}")
    table.box, table.padding = box.HORIZONTALS, 0  # so that ten kinds fit 120 characters
    table.add_column(Text("role"))
    for header in (*kinds, "total"):
        table.add_column(Text(header), justify="right")
    for role, sizes in profile.peak.by_role.items():
        cells = [*(sizes.get(kind, 0) for kind in kinds), sum(sizes.values())]
        table.add_row(Text(role), *(Text(_size(size, unit)) for size in cells))
    _add_total(table, [_size(size, unit) for size in (*kinds.values(), profile.peak_bytes)])
    return _keep_words(table)


def largest_table(profile: Profile, phase: str | None = None, count: int = 5) -> Table:
    """Return the `count` largest storages alive at the peak of `phase`, or of the step, sizes in one unit.

    Raises:
        DataError: when the phase was not measured.
    """
    phase = profile.peak_phase if phase is None else phase
    kinds_at_peak(profile, phase)
    tensors = profile.phases[phase].largest[:count]
    name, unit = unit_for(tensor.bytes for tensor in tensors)
    table = _table(f"{profile.method}, {source(profile)}: largest storages at the peak of {phase}, {name}")
    table.add_column(Text("size"), justify="right")
    for header in ("shape", "dtype", "kind", "role", "made in", "operation"):
        table.add_column(Text(header))
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        cells = (_size(tensor.bytes, unit), shape, tensor.dtype, tensor.kind, tensor.role, tensor.phase, tensor.operation)
        table.add_row(*map(Text, cells))
    return _keep_words(table)


def print_record(record: Record, console: Console) -> None:
    """Print the comparison and each method's phases; of a single method its summary, phases and roles."""
    if len(record.profiles) == 1:
        profile = record.profiles[0]
        console.print(Text(summary_line(profile)))
        tables = [phase_table(profile), role_table(profile)]
    else:
        tables = [comparison_table(record.profiles), *map(phase_table, record.profiles)]
    for table in tables:
        print_table(console, table)


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left")


def _keep_words(table: Table) -> Table:
    """Return `table`, which a narrow console makes wrap between words but not cut a word or a number in two."""
    for column in table.columns:
        texts = [str(column.header), *map(str, column.cells)]
        column.min_width = max(len(word) for text in texts for word in (text.split() or [""]))
    return table


def _add_total(table: Table, cells: Sequence[str]) -> None:
    table.add_section()
    table.add_row(Text("total"), *map(Text, cells), style="bold", end_section=True)


def _size(size: int | None, unit: int) -> str:
    if size is None:
        return NOT_MEASURED
    if 0 < size < unit / 200:  # would be rounded to 0.00, which reads as none
        return "<0.01"
    return f"{size / unit:,.2f}" if size else "0"
