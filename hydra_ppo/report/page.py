"""The page of one run, or of several over one another."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from hydra_ppo.errors import ConfigError
from hydra_ppo.report.charts import COLOURS, Chart, bar_chart, line_chart, number
from hydra_ppo.report.document import html_page, shown
from hydra_ppo.report.gathered import Gathered, charts, differing, gather_all, memory_peaks, value_text
from hydra_ppo.report.scripts import FILTER, LIVE
from hydra_ppo.runs.outcomes import outcomes
from hydra_ppo.runtime.files import write_whole

MIB, GIB = 2**20, 2**30
MOST_SAMPLES = 200
"""Samples of a run on its page; the file has all."""
LONGEST = 4000
"""Letters of a text that are shown."""


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of some runs and return its path.

    Raises:
        ConfigError: where a folder holds no run, or the page cannot be written.
        DataError: where a file of a run is broken.
    """
    text = report_of(folders)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise ConfigError(f"output={str(output)!r} cannot be written ({error.strerror}); choose another file.") from None
    return output


def report_of(folders: Sequence[Path], *, is_live: bool = False) -> str:
    """Return the page of some runs.

    Args:
        folders: of sft or ppo, as they were named: commands on the page name them so.
        is_live: the page fetches itself again.
    """
    runs = gather_all(folders)
    title = f"hydra-ppo: {' and '.join(run.label for run in runs)}"
    body = f'<main id="page">\n{content(runs)}\n</main>'
    return html_page(title, body, LIVE + FILTER if is_live else FILTER, is_live=is_live)


def content(runs: Sequence[Gathered]) -> str:
    """Return what the page says of its runs."""
    parts = [f"<h1>{shown(' and '.join(run.label for run in runs))}</h1>", *(_state(run) for run in runs)]
    parts.append(_outcome(runs))
    parts += [_alarms(run, len(runs) > 1) for run in runs if run.found["alarms"]]
    parts.append(_curves(charts(runs), len(runs) > 1))
    parts += [_memory(run, len(runs) > 1) for run in runs if memory_peaks(run)]
    parts += [_samples(run, len(runs) > 1) for run in runs if run.pairs or run.samples]
    parts.append(_differences(runs) if len(runs) > 1 else _changed(runs[0]))
    parts += [_onward(run, len(runs) > 1) for run in runs]
    parts += [_last_metrics(run, len(runs) > 1) for run in runs if run.records]
    parts.append(_versions(runs))
    return "\n".join(part for part in parts if part)


def _state(run: Gathered) -> str:
    found = run.found
    last = "no step yet" if found["last_step"] is None else f"step {found['last_step']}"
    words = f"{found['command']}: {found['state']}, {last}. Started {found['started'] or '-'}"
    words += f", finished {found['finished']}." if found["finished"] else "."
    error = f'<p class="alarm">{shown(str(found["error"]))}</p>' if found["error"] else ""
    return f'<p class="soft">{shown(f"{run.label} is {words}")}</p>{error}'


def _outcome(runs: Sequence[Gathered]) -> str:
    """Return a table of the first and the last evaluation."""
    rows = []
    for run in runs:
        for found in outcomes(run.records, run.summary):
            before, after = (number(value) for value in found.values)
            first, last = (number(step) for step in found.steps)
            error = "" if found.error is None else f" ± {number(found.error)}"
            cells = ["-", after, "-", f"step {last}"]
            if found.gain is not None:
                cells = [before, after, number(found.gain) + error, f"step {first} to {last}"]
            rows.append([*([run.label] if len(runs) > 1 else []), found.label, *cells])
    head = (["run"] if len(runs) > 1 else []) + ["held-out evaluation", "first", "last", "difference", "measured"]
    return table("What came of it", head, rows, right=range(len(head) - 4, len(head) - 1)) if rows else ""


def _is_measured(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _of(run: Gathered, many: bool) -> str:
    return f" of {shown(run.label)}" if many else ""


def _alarms(run: Gathered, many: bool) -> str:
    lines = "".join(
        f'<p class="alarm"><strong>step {shown(str(alarm.get("step")))}: {shown(str(alarm.get("name")))}.</strong> '
        f"{shown(str(alarm.get('line')))}</p>"
        for alarm in run.found["alarms"]
    )
    return f"<h2>Alarms{_of(run, many)}</h2>{lines}"


def _curves(found: Sequence[Chart], many: bool) -> str:
    if not found:
        return '<h2>Curves</h2><p class="soft">Nothing has been logged yet.</p>'
    figures = "".join(
        f'<figure><figcaption>{escape(chart.title)} <span class="soft">{escape(chart.unit)}</span></figcaption>'
        f"{line_chart(chart)}{_legend(chart, many)}</figure>"
        for chart in found
    )
    said = "Dashed red lines are alarms. " if any(chart.marks for chart in found) else ""
    text = f"{said}Point at a line to read its values. Step 0 is the evaluation before training."
    return f'<h2>Curves</h2><p class="soft">{text}</p><div class="cards">{figures}</div>'


def _legend(chart: Chart, many: bool) -> str:
    if len(chart.lines) < 2 and not many:
        return ""
    spans = "".join(
        f'<span class="c{line.colour % COLOURS}{" held-out" if line.is_held_out else ""}">{shown(line.label)}</span>'
        for line in chart.lines
    )
    return f'<div class="legend">{spans}</div>'


def _memory(run: Gathered, many: bool) -> str:
    peaks = memory_peaks(run)
    device = run.found.get("device") or {}
    total = device.get("bytes") if isinstance(device, Mapping) else None
    most = max([peak for _, peak in peaks] + ([total] if _is_measured(total) else []))
    unit, size = ("GiB", GIB) if most >= GIB else ("MiB", MIB)
    limit = (str(device.get("name")), total / size) if _is_measured(total) else None
    chart = bar_chart("Peak memory by phase", unit, [(phase, peak / size) for phase, peak in peaks], limit)
    return (
        f"<h2>Memory{_of(run, many)}</h2><div class='cards'><figure><figcaption>Peak by phase "
        f'<span class="soft">{unit}, highest of the measured steps</span></figcaption>{chart}</figure></div>'
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [{len(text) - LONGEST} more letters]"


def _samples(run: Gathered, many: bool) -> str:
    if not run.pairs:
        return _unpaired(run, many)
    boxes = []
    for place, pair in enumerate(run.pairs[:MOST_SAMPLES]):
        before, after = pair.scores
        gain = after - before if before is not None and after is not None else None
        sides = "".join(
            f'<div><strong>{label}</strong>{_scored(score)}<div class="text">{shown(_cut(text))}</div></div>'
            for label, score, text in (("before", before, pair.before), ("after", after, pair.after))
        )
        changed = "no" if pair.before == pair.after else "yes"
        boxes.append(
            f'<div class="sample" data-place="{place}" data-gain="{0.0 if gain is None else gain!r}" data-changed="{changed}">'
            f'<div class="text prompt">{shown(_cut(pair.prompt))}</div><div class="sides">{sides}</div></div>'
        )
    assert run.pair_steps is not None
    first, last = (number(step) for step in run.pair_steps)
    tools = """<div class="tools"><label>Find <input type="search" class="find"></label>
<label><input type="checkbox" class="changed"> changed only</label>
<label>Order <select class="order"><option value="place">as recorded</option><option value="down">largest gain first</option>
<option value="up">largest loss first</option></select></label> <span class="count soft"></span></div>"""
    more = _more(len(run.pairs))
    return (
        f'<section class="samples"><h2>Samples before and after{_of(run, many)}</h2>'
        f'<p class="soft">Answers to the same held-out prompts at step {first} and at step {last}.{more}</p>{tools}'
        f'<div class="list">{"".join(boxes)}</div></section>'
    )


def _unpaired(run: Gathered, many: bool) -> str:
    step = run.samples[0].get("step")
    boxes = "".join(
        f'<div class="sample"><div class="text prompt">{shown(_cut(str(row.get("prompt"))))}</div>'
        f'<div class="text">{shown(_cut(row["response"]))}</div>{_scored(row.get("score"))}</div>'
        for row in run.samples[:MOST_SAMPLES]
    )
    return (
        f'<section class="samples"><h2>Samples{_of(run, many)}</h2><p class="soft">Of step {shown(str(step))}, to prompts of '
        f"the training. Held-out prompts (data.eval) are answered before and after.{_more(len(run.samples))}</p>"
        f'<div class="list">{boxes}</div></section>'
    )


def _more(count: int) -> str:
    return "" if count <= MOST_SAMPLES else f" The first {MOST_SAMPLES} of {count}; samples.jsonl has all."


def _scored(score: Any) -> str:
    return f' <span class="soft">score {number(score)}</span>' if _is_measured(score) else ""


def _changed(run: Gathered) -> str:
    if run.settings is None:
        return '<h2>Settings</h2><p class="soft">config.yaml cannot be read.</p>'
    rows = [[name, value_text(value), "-" if default is None else value_text(default)] for name, value, default in run.changed]
    return "<h2>Settings</h2>" + table("What differs from the defaults", ["setting", "value", "default"], rows)


def _differences(runs: Sequence[Gathered]) -> str:
    rows = [[name, *values] for name, values in differing(runs)]
    if not rows:
        return '<h2>Settings</h2><p class="soft">All settings are the same.</p>'
    return "<h2>Settings</h2>" + table("In which the runs differ", ["setting", *(run.label for run in runs)], rows)


def _onward(run: Gathered, many: bool) -> str:
    found, name = run.found, shlex.quote(run.name)
    lines = []
    if found["command"] in ("sft", "ppo"):
        config = shlex.quote(str(Path(run.name) / "config.yaml"))
        if found["state"] == "finished":
            more = "--epochs" if found["command"] == "sft" else "--steps"
            lines.append((f"hydra-ppo {found['command']} {config} --resume {more} N", "makes it longer"))
        else:
            lines.append((f"hydra-ppo {found['command']} {config} --resume", "goes on where it was"))
    if found["command"] == "sft":
        lines.append((f"hydra-ppo ppo ppo.yaml --model.name_or_path {name}", "PPO from here"))
        lines.append((f"hydra-ppo score {name} PAIRS.jsonl", "accuracy of the reward head"))
    if found["command"] == "ppo":
        lines.append((f"hydra-ppo generate {name} --prompts PROMPTS.jsonl --both", "answers of base and actor"))
        lines.append((f"hydra-ppo export {name} --output exported", "a plain model, for transformers or vLLM"))
    rows = [[entry["name"], f"{entry['bytes'] / MIB:,.1f}"] for entry in found["checkpoints"]]
    checkpoints = table("Checkpoints", ["name", "MiB"], rows, right=[1]) if rows else ""
    width = max((len(line) for line, _ in lines), default=0)
    typed = shown("\n".join(f"{line:<{width}}  # {why}" for line, why in lines))
    return f"<h2>How to go on{' with ' + shown(run.label) if many else ''}</h2><pre>{typed}</pre>{checkpoints}"


def _last_metrics(run: Gathered, many: bool) -> str:
    last: dict[str, tuple[Any, Any]] = {}
    for record in run.records:
        last |= {
            name: (value, record.get("step"))
            for name, value in record.items()
            if name not in ("step", "time") and value is not None
        }
    rows = [[name, number(value) if _is_measured(value) else str(value), str(step)] for name, (value, step) in last.items()]
    inside = table("metrics.jsonl, last value of each", ["metric", "value", "step"], rows, right=[1, 2])
    return f"<details><summary>All metrics{_of(run, many)}</summary>{inside}</details>"


def _versions(runs: Sequence[Gathered]) -> str:
    packages = dict.fromkeys(name for run in runs for name in (run.found["packages"] or {}))
    rows = [["hydra-ppo", *(str(run.found["version"]) for run in runs)]]
    rows += [[name, *(str((run.found["packages"] or {}).get(name)) for run in runs)] for name in packages]
    head = ["package", *(run.label if len(runs) > 1 else "version" for run in runs)]
    return f"<details><summary>Versions</summary>{table('Versions', head, rows)}</details>"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Return a table that scrolls inside itself where the page is narrower; all of it is escaped here.

    Args:
        right: numbers of the columns of numbers.
    """
    to_right = set(right)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=right' if place in to_right else ''}>{shown(cell)}</{tag}>" for place, cell in enumerate(row)
        )

    filled = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="fixed"><caption>{shown(title)}</caption>'
        f"<thead><tr>{cells('th', head)}</tr></thead>\n<tbody>{filled}</tbody></table></div>"
    )
