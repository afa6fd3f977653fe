"""Lines over the steps of a run, as SVG: crisp at any size, light and dark by the page's own colours, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 30
"""Of the plotted area, in units of the picture."""
COLOURS = 8
MOST_DOTS = 120
"""Points that get a dot to point at; of more, every n-th."""


@dataclass(frozen=True)
class Line:
    """Points of one metric of one run.

    Attributes:
        label: what the legend says.
        steps, values: as many of both, finite.
        colour: number of the colour.
        is_held_out: drawn dashed, with dots.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    is_held_out: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture of lines over steps.

    Attributes:
        title, unit: of the values.
        lines: at least one, each of at least one point.
        marks: steps at which an alarm was raised.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[float] = ()


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten) from below `low` to above `high`."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [number * step for number in range(first, last + 1)]


def whole_ticks(high: float, most: int) -> list[float]:
    """Return at most `most` + 1 whole, round numbers from 0 to below or at `high`."""
    step = 1.0
    for power in range(12):
        for factor in (1, 2, 5):
            step = factor * 10.0**power
            if high / step <= most:
                return [number * step for number in range(int(high / step) + 1)]
    return [0.0, high]


def number(value: float) -> str:
    """Write a number short: 0.25, 1,500, 2.1e-05."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def line_chart(chart: Chart) -> str:
    """Return the picture as SVG, with a title for those who do not see it and the value of each dot."""
    lows = [min(line.values) for line in chart.lines]
    highs = [max(line.values) for line in chart.lines]
    ups = ticks(min(lows), max(highs), 4)
    end = max(max(line.steps) for line in chart.lines)
    across = whole_ticks(max(end, 1.0), 6)
    low, high = ups[0], ups[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(end, 1.0)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for value in ups:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="up" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{number(value)}</text>')
    for step in across:
        parts.append(f'<text class="across" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}">{number(step)}</text>')
    for step in chart.marks:
        parts.append(f'<line class="mark" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in chart.lines:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(line.steps, line.values, strict=True))
        held_out = " held-out" if line.is_held_out else ""
        parts.append(f'<polyline class="line c{line.colour % COLOURS}{held_out}" points="{points}"/>')
        every = math.ceil(len(line.steps) / MOST_DOTS)
        shown = " shown" if line.is_held_out or len(line.steps) <= 25 else ""
        for s, v in list(zip(line.steps, line.values, strict=True))[::every]:
            said = escape(f"{line.label}: {number(v)} at step {number(s)}")
            parts.append(
                f'<circle class="dot c{line.colour % COLOURS}{shown}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3">'
                f"<title>{said}</title></circle>"
            )
    parts.append(f'<text class="up" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}">step</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(describe(chart))}">' + "".join(parts) + "</svg>"


def describe(chart: Chart) -> str:
    """Say in words what the picture shows: where each line begins and ends."""
    lines = [
        f"{line.label} goes from {number(line.values[0])} at step {number(line.steps[0])} to {number(line.values[-1])} at step "
        f"{number(line.steps[-1])}"
        for line in chart.lines
    ]
    return f"{chart.title}, {chart.unit}: " + "; ".join(lines)


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, float]], limit: tuple[str, float] | None = None) -> str:
    """Return bars that lie under one another, as SVG.

    Args:
        bars: label and value, none negative.
        limit: label and value of a line that they are held against, such as what a card has.
    """
    height = 22 * len(bars) + (40 if limit else 16)
    left, right = 110, 70
    most = max([value for _, value in bars] + ([limit[1]] if limit else [])) or 1.0

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * value / most

    parts = []
    for row, (label, value) in enumerate(bars):
        top = 8 + 22 * row
        parts.append(f'<text class="up" x="{left - 8}" y="{top + 11}">{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{top}" width="{max(x(value) - left, 0.5):.1f}" height="15"/>')
        parts.append(f'<text class="beside" x="{x(value) + 6:.1f}" y="{top + 11}">{number(value)}</text>')
    if limit:
        parts.append(f'<line class="mark" x1="{x(limit[1]):.1f}" x2="{x(limit[1]):.1f}" y1="4" y2="{height - 22}"/>')
        said = escape(f"{limit[0]}: {number(limit[1])} {unit}")
        parts.append(f'<text class="up" x="{WIDTH - 8}" y="{height - 8}">{said}</text>')
    words = "; ".join(f"{label} {number(value)}" for label, value in bars)
    words += f"; {limit[0]} {number(limit[1])}" if limit else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}, {unit}: {words}")}">'
        + "".join(parts)
        + "</svg>"
    )
