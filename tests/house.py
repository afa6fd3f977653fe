"""The rooms of the project, read from its imports: which floor each stands on, and every arrow that points the wrong way.

`python -m tests.house` prints the floors, circles and arrows back up; `--draw` writes the picture of docs/architecture.md.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("errors", "experience", "algorithms"),
    ("config", "runtime", "compat"),
    ("parallel",),
    ("compute", "data"),
    ("model", "runs"),
    ("rewards", "rollout", "views", "report"),
    ("training", "patches"),
    ("cli",),
    ("quickstart", "__main__"),
    ("profiling.workload",),
    ("profiling.subjects",),
    ("profiling.measuring",),
    ("profiling.reporting",),
    ("profiling.validate", "profiling.learning", "profiling.benchmarks"),
    ("profiling.cli",),
)
"""From the ground up. A module uses its own room and those on the floors below it, never another room of its own floor."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}

TOP_LEVEL = ("HydraModel", "JointSFTTrainer", "PPOTrainer", "PPOConfig", "SFTConfig", "HydraError", "role_views")
"""Public names that `hydra_ppo` itself resolves; the library does not use that door."""

PICTURE = ROOT / "docs" / "rooms.svg"


def packages() -> dict[str, Path]:
    """Return every `__init__.py` by the name that it gives its package, `hydra_ppo.` left out."""
    return {name.removesuffix(".__init__"): path for name, path in _files() if path.name == "__init__.py"}


@cache
def modules() -> Mapping[str, Path]:
    """Return every module by its name, `hydra_ppo.` left out: `compute.lora`, `patches.trl`."""
    return {name: path for name, path in _files() if path.name != "__init__.py"}


def _files() -> Iterator[tuple[str, Path]]:
    for folder, prefix in (("hydra_ppo", ""), ("patches", "patches."), ("profiling", "profiling.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts), path


def room_of(module: str) -> str:
    """Return the room that a module stands in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "profiling" else parts[0]


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of this project that one imports, also inside functions and for types alone."""
    return frozenset(_named(ast.walk(ast.parse(modules()[module].read_text()))))


def at_once(module: str) -> set[str]:
    """Return the modules of this project that one imports as soon as it is imported, not those for types alone."""
    return _named(ast.parse(modules()[module].read_text()).body) & modules().keys()


def _named(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hydra_ppo":
            package = (node.module or "").removeprefix("hydra_ppo").removeprefix(".")
            for alias in node.names:
                inner = f"{package}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules() or not package else package)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("hydra_ppo.") for a in node.names if a.name.startswith("hydra_ppo.")}
    return found - {"__version__"}


def foreign(module: str) -> set[str]:
    """Return the packages of others that a module imports as soon as it is imported."""
    found = set()
    for node in ast.parse(modules()[module].read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        found |= {name.split(".")[0] for name in names} - {"hydra_ppo", ""}
    return found


def arrows_up() -> list[tuple[str, str]]:
    """Return the imports, as pairs of modules, that do not point to the same room or a lower floor."""
    wrong = []
    for module in modules():
        for other in sorted(imports(module)):
            here, there = room_of(module), room_of(other)
            if here != there and FLOOR.get(there, len(FLOORS) + 1) >= FLOOR[here]:
                wrong.append((module, other))
    return wrong


def circles() -> list[tuple[str, ...]]:
    """Return the groups of modules that import each other around a circle."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:  # Tarjan 1972: strongly connected components
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports(module) & modules().keys()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for module in modules():
        if module not in index:
            visit(module)
    return found


def used_by(room: str) -> set[str]:
    """Return the rooms that a room uses."""
    return {room_of(other) for module in modules() if room_of(module) == room for other in imports(module)} - {room}


def purpose(room: str) -> str:
    """Return the first line of a room's docstring."""
    path = packages().get(room) or modules()[room]
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].rstrip(".")


def direct() -> set[tuple[str, str]]:
    """Return which room uses which, without what a longer way implies."""
    uses = {room: used_by(room) for room in FLOOR}
    reach: dict[str, set[str]] = {}
    for room in FLOOR:  # from the ground up: whatever a room uses is done
        reach[room] = uses[room].union(*(reach[other] for other in uses[room]))
    return {
        (room, other)
        for room, others in uses.items()
        for other in others
        if not any(other in reach[between] for between in others)
    }


def draw() -> str:
    """Return the picture of the rooms, as SVG: floors from the top, an arrow from a room to each that it uses directly."""
    row, width, height, gap, letters = 100, 340, 62, 16, 58
    total = 3 * (width + gap) + gap
    middle = {
        room: (
            total / 2 + (place - (len(rooms) - 1) / 2) * (width + gap) + (len(rooms) == 1) * (120 if floor % 2 else -120),
            (len(FLOORS) - floor) * row + 20 + height / 2,
        )
        for floor, rooms in enumerate(FLOORS, 1)
        for place, room in enumerate(rooms)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{len(FLOORS) * row + 10}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#557"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for here, there in sorted(direct()):
        (x, y), (u, v) = middle[here], middle[there]
        y, v = y + height / 2, v - height / 2
        lines.append(
            f'<path d="M{x:.0f},{y:.0f} C{x:.0f},{(y + v) / 2:.0f} {u:.0f},{(y + v) / 2:.0f} {u:.0f},{v:.0f}" '
            'fill="none" stroke="#99a" stroke-width="1.3" marker-end="url(#tip)"/>'
        )
    for room, (x, y) in middle.items():
        fill = "#eef3ff" if not room.startswith("profiling") else "#f3eeff"
        left, top = x - width / 2, y - height / 2
        lines += [
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="#557"/>',
            f'<text x="{left + 10:.0f}" y="{top + 20:.0f}" font-size="14" font-weight="bold">{room}</text>',
        ]
        for number, line in enumerate(textwrap.wrap(purpose(room).replace("`", ""), letters, max_lines=2, placeholder=" …")):
            place = f'x="{left + 10:.0f}" y="{top + 37 + 15 * number:.0f}"'
            lines.append(f'<text {place} font-size="11" fill="#444">{escape(line)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Print the floors from the top, what each room uses, and what points the wrong way; or draw them."""
    if sys.argv[1:] == ["--draw"]:
        PICTURE.write_text(draw())
        print(f"wrote {PICTURE.relative_to(ROOT)}")
        return
    for number, rooms in reversed(list(enumerate(FLOORS, 1))):
        for room in rooms:
            count = sum(room_of(module) == room for module in modules())
            uses = ", ".join(sorted(used_by(room), key=lambda other: (FLOOR[other], other))) or "nothing"
            print(f"{number:3}  {room:<22}{count:3} files  uses {uses}")
    wrong = {"circles": [" - ".join(c) for c in circles()], "arrows back up": [" -> ".join(a) for a in arrows_up()]}
    for what, found in wrong.items():
        print(f"{what}: {len(found)}", *found, sep="\n  ")


if __name__ == "__main__":
    main()
