"""Charts as inline SVG, drawn here: lines over steps, and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hydra_ppo.report.style import COLOURS, text

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
"""Edges around what is drawn, in the units of the picture; it is shown at about one pixel each."""
MOST_POINTS = 600
UNITS = {"bytes": 1.0}


@dataclass(frozen=True)
class Line:
    """A metric over steps.

    Attributes:
        label: what the legend says.
        steps, values: of the same length, all finite.
        colour: number of its colour.
        dashed: whether it is the second of two metrics that share their colour.
        kind: what was measured, where lines of one colour differ in that.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    dashed: bool = False
    kind: str = ""


def ticks(low: float, high: float, most: int = 5, least: float = 0.0) -> list[float]:
    """Return round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart, `least` or more.

    Both ends finite; where they are equal, that number alone.
    """
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next((times for times in (1, 2, 5) if span / (step * times) <= most), 10)
    step = max(step, least)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, spacing: float = 0.0) -> str:
    """Return a number as short as it may be told: digits up to `spacing`, thousands with commas, tiny ones as 1e-06."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = max(abs(value), spacing)
    digits = max(0, -math.floor(math.log10(spacing) + 1e-9)) if spacing else 0
    if digits > 3 and size < 0.01:  # a label of a tick that would not fit
        power = math.floor(math.log10(size) + 1e-9)
        return f"{value / 10.0**power:.{max(0, digits + power)}f}e{power}"
    if size < 1e-4 or size >= 1e7:
        return f"{value:.3g}"
    if spacing:
        return f"{value:,.{min(digits, 8)}f}"
    digits = 0 if size >= 1000 else max(0, 3 - math.floor(math.log10(size)))
    shown = f"{value:,.{min(digits, 6)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def gibibytes(largest: float) -> tuple[str, float]:
    """Return the unit in which a largest size is a number of some digits, and its bytes."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(4, max(0, int(math.log2(largest) // 10))) if largest >= 1 else 0
    return names[power], 1024.0**power


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """Return steps and values, of a long line the least and the greatest of each stretch: a spike is never lost."""
    steps, values = list(line.steps), list(line.values)
    if len(steps) <= MOST_POINTS:
        return steps, values
    stretch = math.ceil(2 * len(steps) / MOST_POINTS)
    kept = []
    for begin in range(0, len(steps), stretch):
        part = range(begin, min(begin + stretch, len(steps)))
        kept += sorted({min(part, key=values.__getitem__), max(part, key=values.__getitem__)})
    kept = sorted({0, *kept, len(steps) - 1})
    return [steps[i] for i in kept], [values[i] for i in kept]


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    marks: Mapping[float, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """Return a figure of lines over the same steps.

    Args:
        title, unit: what is shown, and in what.
        lines: drawn in this order; those without a point are left out.
        marks: vertical marks, and what each says.
        limits: least and greatest value shown; None takes them from the values.

    Returns:
        HTML, empty where there is nothing to draw.
    """
    drawn = [(line, *_thinned(line)) for line in lines if len(line.steps)]
    if not drawn:
        return ""
    low, high = limits or _range([value for _, _, values in drawn for value in values])
    first = min(min(steps) for _, steps, _ in drawn)
    last = max(max(steps) for _, steps, _ in drawn)
    across = _Scale(first, last, LEFT, WIDTH - RIGHT)
    down = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(down, ticks(low, high)), _steps(across, ticks(first, last, most=6, least=1.0))]
    for step, said in sorted((marks or {}).items()):
        if first <= step <= last:
            x = across(step)
            parts.append(
                f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"><title>{text(said)}</title></line>'
            )
    for line, steps, values in drawn:
        parts.append(_path(line, steps, values, across, down))
    parts.append(f'<line class="at" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    said = "; ".join(_summary(line) for line, _, _ in drawn)
    several = len(drawn) > 1
    legend = _legend([line for line, _, _ in drawn]) if several else ""
    return (
        f'<figure class="chart" data-first="{first:g}" data-last="{last:g}"><figcaption><strong>{text(title)}</strong> '
        f'<span class="soft">{text(unit)}</span></figcaption>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0">'
        + f"<title>{text(', '.join(filter(None, (title, unit))))}. {text(said)}</title>"
        + "".join(parts)
        + f'</svg><p class="read soft" aria-live="polite">{text(_latest(drawn[0][0], drawn, several))}</p></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return round(self.begin + (self.end - self.begin) * min(max(share, 0.0), 1.0), 2)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return (0.0, 2 * high) if low > 0 else (low - 1.0, high + 1.0) if low < 0 else (0.0, 1.0)
    room = 0.06 * (high - low)
    # Nothing below zero is shown of what has nothing there; and what is close to zero is shown from it.
    below = 0.0 if low >= 0 and low - room < 0.15 * high else low - room
    return below, high + room


def _grid(down: _Scale, at: Sequence[float]) -> str:
    spacing = at[1] - at[0] if len(at) > 1 else 0.0
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(value)}" y2="{down(value)}"/>'
        f'<text x="{LEFT - 6}" y="{down(value) + 3.5:g}" text-anchor="end">{text(number(value, spacing))}</text>'
        for value in at
    )


def _steps(across: _Scale, at: Sequence[float]) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for value in at:
        x = across(value)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x}" y="{base + 16}" text-anchor="{anchor}">{text(number(value, 1.0))}</text>')
    return "".join(parts)


def _path(line: Line, steps: Sequence[float], values: Sequence[float], across: _Scale, down: _Scale) -> str:
    points = [(across(step), down(value)) for step, value in zip(steps, values, strict=True)]
    where = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    data = " ".join(f"{step:g}" for step in steps), " ".join(f"{value:.6g}" for value in values)
    look = f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    dots = ""
    if len(points) <= 25:
        dots = "".join(f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="2.4"/>' for x, y in points)
    return (
        f'<g class="{look}"><path class="line" d="{where}" data-label="{text(line.label)}" data-steps="{data[0]}" '
        f'data-values="{data[1]}"/>{dots}</g>'
    )


def _legend(lines: Sequence[Line]) -> str:
    """Return a swatch for each line; where each colour has two kinds of line, one for both, and what the kinds are."""
    kinds = dict.fromkeys(("dashed" if line.dashed else "solid", line.kind) for line in lines if line.kind)
    if len(kinds) < 2:
        return "".join(map(_swatch, lines))
    first = {line.colour: line for line in reversed(lines)}
    said = ", ".join(f"{look}: {kind}" for look, kind in kinds)
    shown = "".join(_swatch(replace(line, dashed=False)) for line in reversed(first.values()))
    return f'{shown}<li class="soft">{text(said)}</li>'


def _swatch(line: Line) -> str:
    look = f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    return (
        f'<li><svg class="swatch {look}" viewBox="0 0 22 8" aria-hidden="true"><path class="line" d="M1 4 L21 4"/></svg>'
        f"{text(line.label)}</li>"
    )


def _summary(line: Line) -> str:
    begin, end = number(line.values[0]), number(line.values[-1])
    return f"{line.label}: {begin} at step {line.steps[0]:g}, {end} at step {line.steps[-1]:g}"


def _latest(_: Line, drawn: Sequence[tuple[Line, list[float], list[float]]], several: bool) -> str:
    last = max(line.steps[-1] for line, _, _ in drawn)
    found = [(line.label + " " if several else "") + number(line.values[-1]) for line, _, _ in drawn if line.steps[-1] == last]
    return f"step {last:g}: " + ", ".join(found)


def bar_chart(title: str, rows: Sequence[tuple[str, str, float, int]], whole: tuple[str, float] | None = None) -> str:
    """Return a figure of sizes in bytes as bars.

    Args:
        rows: group, name, bytes and colour of each; a name is empty where a group has one bar.
        whole: what holds all of them, and its bytes: a mark.
    """
    if not rows:
        return ""
    top = max([size for _, _, size, _ in rows] + ([whole[1]] if whole else []))
    unit, one = gibibytes(top)
    left, right, tall = 92, 64, 22
    across = _Scale(0.0, top, left, WIDTH - right)
    parts, y, before = [], 4, ""
    for group, name, size, colour in rows:
        y += 6 if before and group != before else 0
        label = group if group != before else ""
        before = group
        shown = f"{number(float(f'{size / one:.3g}'))} {unit}"
        if label:
            parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{text(label)}</text>')
        long, what = max(across(size) - left, 0.5), " ".join(filter(None, (group, name, shown)))
        parts.append(
            f'<g class="c{colour % COLOURS}"><rect class="bar" x="{left}" y="{y + 2}" height="{tall - 6}" '
            f'width="{long:g}"><title>{text(what)}</title></rect></g>'
            f'<text x="{across(size) + 5:g}" y="{y + 13}">{text(shown)}</text>'
        )
        y += tall
    if whole:
        x = across(whole[1])
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="0" y2="{y + 2}"/>')
        parts.append(
            f'<text x="{x}" y="{y + 16}" text-anchor="end">{text(whole[0])}: {text(number(whole[1] / one))} {unit}</text>'
        )
        y += 18
    said = "; ".join(f"{' '.join(filter(None, (group, name)))} {number(size / one)} {unit}" for group, name, size, _ in rows)
    names = dict.fromkeys((name, colour) for _, name, _, colour in rows if name)
    legend = "".join(_swatch(Line(name, (), (), colour)) for name, colour in names)
    return (
        f'<figure class="chart bars"><figcaption><strong>{text(title)}</strong></figcaption>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<svg viewBox="0 0 {WIDTH} {y + 4}" role="img"><title>{text(title)}. {text(said)}</title>'
        + f"{''.join(parts)}</svg></figure>"
    )


CHART_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.chart { margin: 0; padding: 0.75rem 0.75rem 0.35rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; min-width: 0; display: flex; flex-direction: column; }
.chart figcaption { font-size: 0.9rem; line-height: 1.35; margin-bottom: 0.25rem; }
.chart > svg { display: block; width: 100%; height: auto; margin-top: auto; touch-action: pan-y; }
.chart.bars > svg { margin-top: 0.5rem; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 0.6; } .axis { stroke: var(--soft); stroke-width: 0.8; }
.line { fill: none; stroke: var(--line, var(--c0)); stroke-width: 1.7; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.dashed .line { stroke-dasharray: 5 3; }
.dot, .bar { fill: var(--line, var(--c0)); }
.mark { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 3 3; opacity: 0.5; }
.at { stroke: var(--ink); stroke-width: 0.8; visibility: hidden; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; margin: 0 0 0.3rem; padding: 0;
  font-size: 0.8rem; }
.swatch { width: 22px; height: 8px; margin-right: 0.35rem; vertical-align: middle; }
.read { font-size: 0.8rem; line-height: 1.35; margin: 0.15rem 0 0; min-height: 2.7em; max-width: none;
  font-variant-numeric: tabular-nums; }
"""
