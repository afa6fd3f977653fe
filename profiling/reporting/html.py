"""A report in one HTML file, which asks nothing of the network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from hydra_ppo.profiling.measuring.record import Profile, Record
from hydra_ppo.profiling.reporting.pictures import comparison_figure, darkened, timeline_figure
from hydra_ppo.profiling.reporting.report import (
    comparison_table,
    format_bytes,
    largest_table,
    phase_table,
    role_table,
    source,
    summary_line,
)
from hydra_ppo.report.style import page, table, text

TITLE = "hydra-ppo: memory of PPO"
SIMULATED = "The tensors were fake: each has a size and holds no numbers, so nothing here was read from a device or timed."
MEASURED = "The tensors were real, and lived on the device that is named."
TERMS = (
    "Static: weights of all bases, adapters and heads. Floor: static with the gradients that exist at once (in-turn, one "
    "role's) and the optimizer state that is on the device in the updates; with these settings nothing can hold less. "
    "Peak: most bytes alive at once in a PPO step."
)


def write_html(record: Record, path: Path) -> Path:
    """Write settings, versions, tables and pictures of `record` as one HTML file and return `path`.

    Raises:
        DataError: when the record holds no profile, or kinds do not add up to their peak.
    """
    profiles = record.profiles
    parts = [_table(comparison_table(profiles)), _picture(comparison_figure(profiles), _compared(profiles))]
    parts += [_table(_settings_table(profiles)), _table(_versions_table(record.versions))]
    for profile in profiles:
        parts += [f"<h2>{text(profile.method)}, {text(source(profile))}</h2>", f"<p>{text(summary_line(profile))}</p>"]
        if profile.timeline is not None:
            parts.append(_picture(timeline_figure(profile), f"Live memory over a PPO step. {summary_line(profile)}"))
        tables = [build(profile) for build in (phase_table, role_table, largest_table)]
        parts += [_table(found) for found in tables if found.rows]
    body = "\n".join([f"<h1>{TITLE}</h1>", _sources(profiles), f"<p>{TERMS}</p>", *parts])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(TITLE, body), encoding="utf-8")
    return path


def _sources(profiles: Sequence[Profile]) -> str:
    methods: dict[str, list[str]] = {}
    for profile in profiles:
        methods.setdefault(source(profile), []).append(profile.method)
    explained = {source(profile): SIMULATED if profile.simulated else MEASURED for profile in profiles}
    return "\n".join(
        f"<p><strong>{text(where[0].upper() + where[1:])}: {text(', '.join(names))}.</strong> {explained[where]}</p>"
        for where, names in methods.items()
    )


def _settings_table(profiles: Sequence[Profile]) -> Table:
    names = dict.fromkeys(name for profile in profiles for name in profile.settings)
    rows = {name: [_show(profile.settings, name) for profile in profiles] for name in names}
    shared = all(len(set(values)) == 1 for values in rows.values())
    table = Table(title=Text("Settings"))
    for header in ("setting", *(["value"] if shared else [profile.method for profile in profiles])):
        table.add_column(Text(header))
    for name, values in rows.items():
        table.add_row(Text(name), *map(Text, values[:1] if shared else values))
    return table


def _versions_table(versions: Mapping[str, str | None]) -> Table:
    table = Table("package", "version", title=Text("Versions"))
    for name, version in versions.items():
        table.add_row(Text(name), Text(version or "not installed"))
    return table


def _show(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "-"
    value = settings[name]
    # As JSON, a value reads the same before it was saved and after.
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(shown: Table) -> str:
    """Return what the terminal shows, as HTML; all of it is escaped there."""
    columns = shown.columns
    return table(
        [str(column.header) for column in columns],
        list(zip(*(column.cells for column in columns), strict=True)),
        caption=str(shown.title),
        right=[number for number, column in enumerate(columns) if column.justify == "right"],
        total=[number for number, row in enumerate(shown.rows) if row.style],
    )


def _compared(profiles: Sequence[Profile]) -> str:
    peaks = ", ".join(f"{profile.method} {format_bytes(profile.peak_bytes)}" for profile in profiles)
    return f"Memory by kind at the peak of a PPO step: {peaks}"


def _picture(figure: Figure, description: str) -> str:
    light, dark = _png(figure), _png(darkened(figure))
    image = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{text(description)}" src="{light}"></picture>'
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Picture">{image}</div>'


def _png(figure: Figure) -> str:
    png = BytesIO()
    figure.savefig(png, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
