"""Pictures of what was measured: live memory over a PPO step, and the peaks of several methods."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.measuring.record import KINDS, Profile, Timeline
from hydra_ppo.profiling.reporting.figures import blank, clean, save
from hydra_ppo.profiling.reporting.report import format_bytes, kinds_at_peak, source, unit_for

# Paul Tol's muted scheme, with a blue; neighbours in the stack differ in lightness too.
KIND_COLOURS = {
    "base weights": "#332288",
    "adapters": "#88ccee",
    "heads": "#117733",
    "gradients": "#ddcc77",
    "optimizer": "#882255",
    "kv cache": "#44aa99",
    "activations": "#cc6677",
    "dequantised weights": "#999933",
    "rollout copies": "#8c564b",
    "gathered layers": "#ee8866",
    "log-probs": "#aa4499",
    "experience": "#4477aa",
    "other": "#bbbbbb",
}
DARK_PAGE = "#15181b"
ON_DARK = {"#ffffff": DARK_PAGE, "#332288": "#8478e0", "#882255": "#d1619b", "#117733": "#3fae68"}
"""What becomes of the page, and of kinds whose colours are too dark for it."""
PHASE_COLOUR = "#555555"
INK = "#111111"
FLOOR_MARK = {"color": INK, "marker": "^", "linestyle": "none", "markersize": 6}
WIDTH = 8.0  # inches
LEGEND_COLUMNS = 4


def draw_timeline(profile: Profile, path: Path) -> Path:
    """Draw live memory by kind over the samples of a PPO step, with its phases, floor and peak; return `path`.

    Raises:
        DataError: when the profile has no timeline.
    """
    return save(timeline_figure(profile), path)


def draw_comparison(profiles: Sequence[Profile], path: Path) -> Path:
    """Draw one bar per profile, its memory by kind at the peak, with total and floor; return `path`.

    Raises:
        DataError: when there is no profile, or kinds do not add up to their peak.
    """
    return save(comparison_figure(profiles), path)


def timeline_figure(profile: Profile) -> Figure:
    """Return the figure that `draw_timeline` saves."""
    timeline = profile.timeline
    if timeline is None:
        raise DataError(f"timeline=None for {profile.method}, and this picture is drawn from one; measure again and keep it.")
    totals = [sum(sizes) for sizes in zip(*timeline.kinds.values(), strict=True)]
    runs = _runs(timeline, len(totals))
    name, unit = unit_for([*totals, profile.floor_bytes])

    figure = blank(WIDTH, 4.8)
    phases = list(dict.fromkeys(phase for phase, _, _ in runs))
    axes, strip = figure.subplots(2, sharex=True, height_ratios=(18, max(len(phases), 1)))
    clean(axes)
    clean(strip)
    kinds = [kind for kind in KINDS if any(timeline.kinds.get(kind, ()))]
    for kind, low, high in _stack(timeline, kinds):
        # Each sample holds until the next, so a phase starts where its first sample does.
        x = range(len(totals) + 1)
        low, high = ([size / unit for size in (*edge, edge[-1])] for edge in (low, high))
        axes.fill_between(x, low, high, step="post", color=KIND_COLOURS[kind], linewidth=0)
    handles = [Patch(color=KIND_COLOURS[kind], label=kind) for kind in reversed(kinds)]  # top of the stack first
    top = max(*totals, profile.floor_bytes) / unit
    in_peak_phase = [i for phase, start, end in runs if phase == profile.peak_phase for i in range(start, end)]
    if in_peak_phase:
        at = max(in_peak_phase, key=totals.__getitem__)
        style = {"color": INK, "marker": "v", "linestyle": "none", "markersize": 6, "zorder": 4}
        axes.plot(at + 0.5, totals[at] / unit + top * 0.03, clip_on=False, **style)
        handles.insert(0, Line2D([], [], label=f"peak {format_bytes(profile.peak_bytes)}", **style))
    style = {"color": INK, "linestyle": "--", "linewidth": 1.3}
    axes.axhline(profile.floor_bytes / unit, **style)
    handles.append(Line2D([], [], label=f"floor {format_bytes(profile.floor_bytes)}", **style))

    # One row per phase: names never collide, however often the phases alternate.
    for row, phase in enumerate(phases):
        spans = [(start, end - start) for name_, start, end in runs if name_ == phase]
        strip.broken_barh(spans, (row - 0.36, 0.72), facecolor=PHASE_COLOUR, edgecolor=PHASE_COLOUR, linewidth=0.5)
    for _, start, _ in runs[1:]:
        axes.axvline(start, color="white", linewidth=0.4, alpha=0.6)
    strip.set_yticks(range(len(phases)), phases, fontsize=8)
    strip.invert_yaxis()
    strip.tick_params(axis="y", length=0)
    strip.grid(axis="y", color="#dddddd", linewidth=0.6)

    axes.set_xlim(0, len(totals))
    axes.set_ylim(0, top * 1.08)
    axes.set_ylabel(f"live memory, {name}")
    _title(axes, f"{profile.method}: live memory over a PPO step", source(profile))
    strip.set_xlabel("samples, in the order of events (not to scale with time)")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def comparison_figure(profiles: Sequence[Profile]) -> Figure:
    """Return the figure that `draw_comparison` saves."""
    if not profiles:
        raise DataError("profiles=[] leaves nothing to draw; measure at least one method.")
    by_kind = [kinds_at_peak(profile, profile.peak_phase) for profile in profiles]
    kinds = [kind for kind in KINDS if any(kind in sizes for sizes in by_kind)]
    widest = max(max(profile.peak_bytes, profile.floor_bytes) for profile in profiles)
    name, unit = unit_for([widest])
    sources = [source(profile) for profile in profiles]
    mixed = len(set(sources)) > 1

    row_height = 0.8 if mixed else 0.5
    figure = blank(WIDTH, 1.4 + row_height * len(profiles) + 0.2 * ceil((len(kinds) + 1) / LEGEND_COLUMNS))
    axes = figure.subplots()
    clean(axes)
    for row, (profile, sizes) in enumerate(zip(profiles, by_kind, strict=True)):
        left = 0.0
        for kind, size in sizes.items():
            axes.barh(row, size / unit, left=left, height=0.62, color=KIND_COLOURS[kind])
            left += size / unit
        floor = profile.floor_bytes / unit
        axes.plot(floor, row + 0.39, **FLOOR_MARK)  # under the bar, where it hides no thin slice
        end = max(left, floor)
        axes.annotate(format_bytes(profile.peak_bytes), (end, row), (6, 0), textcoords="offset points", va="center", fontsize=9)
    labels = [profile.method for profile in profiles]
    if mixed:
        labels = [f"{label}\n{fill(where, 16)}" for label, where in zip(labels, sources, strict=True)]
    axes.set_yticks(range(len(profiles)), labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(profiles) - 0.35, -0.4)  # the first on top; below the last, room for its mark
    axes.set_xlim(0, widest / unit * 1.15)  # room for the label of the longest bar
    axes.set_xlabel(name)
    _title(axes, "Memory at the peak of a PPO step", "simulated and measured" if mixed else sources[0])
    handles = [Patch(color=KIND_COLOURS[kind], label=kind) for kind in kinds]
    handles.append(Line2D([], [], label="floor", **FLOOR_MARK))
    figure.legend(handles=handles, loc="outside lower left", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)
    return figure


def darkened(figure: Figure) -> Figure:
    """Turn a figure of this module into one on a dark page, and return it: what is dark becomes light."""
    for artist in {id(artist): artist for artist in figure.findobj(include_self=False)}.values():
        names = ["color"] if isinstance(artist, Text | Line2D) else []
        names = ["facecolor", "edgecolor"] if isinstance(artist, Patch | Collection) else names
        before = {name: to_rgba_array(getattr(artist, f"get_{name}")()) for name in names}
        for name, shades in before.items():
            changed = [(*_on_dark(to_hex(shade)), shade[3]) for shade in shades]
            if changed:
                getattr(artist, f"set_{name}")(changed if isinstance(artist, Collection) else changed[0])
    return figure


def _on_dark(colour: str) -> tuple[float, float, float]:
    """Return what stands for a colour on a dark page: its own there, or greys turned round."""
    if colour in ON_DARK:
        return to_rgb(ON_DARK[colour])
    red, green, blue = to_rgb(colour)
    grey = max(red, green, blue) - min(red, green, blue) < 0.05
    low, high = to_rgb(DARK_PAGE)[0], 0.91
    return (high - (high - low) * red,) * 3 if grey and colour != KIND_COLOURS["other"] else (red, green, blue)


def _runs(timeline: Timeline, samples: int) -> list[tuple[str, int, int]]:
    """Return (phase, first sample, sample after the last), with neighbours of the same phase as one."""
    runs: list[tuple[str, int, int]] = []
    ends = [first for _, first in timeline.phases[1:]] + [samples]
    for (phase, start), end in zip(timeline.phases, ends, strict=True):
        if runs and runs[-1][0] == phase:
            runs[-1] = (phase, runs[-1][1], end)
        else:
            runs.append((phase, start, end))
    return runs


def _stack(timeline: Timeline, kinds: Sequence[str]) -> list[tuple[str, list[int], list[int]]]:
    """Return (kind, lower edge, upper edge) in bytes, each kind on top of those before."""
    layers = []
    low = [0] * len(timeline.kinds[kinds[0]]) if kinds else []
    for kind in kinds:
        high = [below + size for below, size in zip(low, timeline.kinds[kind], strict=True)]
        layers.append((kind, low, high))
        low = high
    return layers


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11)
    axes.annotate(below, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color="#444444")
