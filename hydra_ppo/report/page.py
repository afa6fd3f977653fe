"""The page of a run, or of several over one another: one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.report.charts import CHART_STYLE, LEFT, RIGHT, WIDTH, number
from hydra_ppo.report.panels import card_of, charts_html
from hydra_ppo.report.record import RunRecord, changed_settings, differing_settings, is_number, read_runs
from hydra_ppo.report.samples import FILTER, SAMPLES_STYLE, samples_html, samples_of
from hydra_ppo.report.script import script
from hydra_ppo.report.style import COLOURS, page, table, text
from hydra_ppo.runs.contents import MANIFEST, REPORT
from hydra_ppo.runtime.files import write_whole
from hydra_ppo.runtime.output import as_typed

MIB = 2**20
MARK = "<!-- hydra-ppo report -->"
"""Begins a page: only such a file is written over."""
GOOD = ("finished", "running")

HEAD_STYLE = """
.runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; margin: 1rem 0; }
.run { border: 1px solid var(--rule); border-left: 5px solid var(--line, var(--c0)); border-radius: 6px;
  padding: 0.5rem 0.75rem; background: var(--card); }
.run h3 { margin: 0; } .run p { margin: 0.15rem 0; font-size: 0.875rem; }
.state { font-size: 0.8rem; font-weight: 600; color: var(--bad); } .state.ok { color: var(--good); }
.tiles { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 1rem 0; }
.tile { min-width: 7rem; } .tile dt { font-size: 0.8rem; color: var(--soft); } .tile dd { margin: 0; font-size: 1.25rem;
  font-variant-numeric: tabular-nums; } .tile dd small { font-size: 0.8rem; color: var(--soft); }
.alarm { border-left: 4px solid var(--warn); padding: 0.15rem 0 0.15rem 0.75rem; margin: 0.75rem 0; }
.alarm p { margin: 0.1rem 0; max-width: 60rem; }
.command { margin: 0.25rem 0 1rem; padding: 0.5rem 0.75rem; background: var(--band); border-radius: 4px; overflow-x: auto; }
.how { margin: 0; font-size: 0.9rem; }
#live { position: sticky; top: 0; background: var(--paper); margin: 0; padding: 0.25rem 0; font-size: 0.85rem; z-index: 1; }
"""


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of some runs and return where it is.

    Args:
        folders: of the runs.
        output: file to write; one that is no page of ours is left alone.

    Raises:
        ConfigError: a folder holds no run, or the file cannot be written.
        DataError: the metrics of a run are broken.
    """
    content = report_html(read_runs(folders))
    try:
        if output.exists() and (not output.is_file() or MARK not in output.open(encoding="utf-8", errors="replace").read(200)):
            raise ConfigError(f"output={str(output)!r} is there and is no page of this program; choose another file.")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, content)
    except OSError as error:
        raise ConfigError(f"output={str(output)!r} cannot be written ({error.strerror}); choose another file.") from None
    return output


def report_at_end(folder: Path) -> str:
    """Write the page of a run that has ended into its folder; never raise, a run does not fail of its page.

    Returns:
        A line that says where it is, or why it is not there.
    """
    try:
        return f"Page: {write_report([folder], folder / REPORT)}"
    except HydraError as error:
        return f"warning: {REPORT} was not written: {error}"
    except Exception as error:
        return f"warning: {REPORT} was not written: {type(error).__name__}: {' '.join(str(error).split())}"


def report_html(runs: Sequence[RunRecord], every: float | None = None) -> str:
    """Return the page of some runs.

    Args:
        every: seconds between two looks at what is new, where it is served.
    """
    live = '<p id="live" class="soft" role="status">Live</p>\n' if every is not None else ""
    filled = parts(runs)
    places = {name: f'<div data-part="{name}">{content}</div>' for name, content in filled.items()}
    samples = f"<h2>Samples</h2>{FILTER}{places['samples']}" if filled["samples"] or every is not None else ""
    title = "hydra-ppo: " + ", ".join(run.label for run in runs)
    inside = "\n".join((places["alarms"], places["charts"], samples, places["more"]))
    body = f"{live}<header>{places['head']}</header>\n<main>\n{inside}\n</main>"
    code = script(LEFT, RIGHT, WIDTH, every)
    style = HEAD_STYLE + CHART_STYLE + SAMPLES_STYLE
    whole = page(title, body, style=style, script=code, connects=every is not None)
    return whole.replace("<html", f"{MARK}\n<html", 1)


def parts(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return what changes while a run goes on, as HTML by name: head, alarms, charts, samples, more."""
    samples = samples_of(runs)
    charts = charts_html(runs)
    empty = '<p class="soft">No metrics yet.</p>'
    return {
        "head": _head(runs),
        "alarms": _alarms(runs),
        "charts": "<h2>Curves</h2>" + _how_to_read(runs) + (f'<div class="charts">{charts}</div>' if charts else empty),
        "samples": samples_html(samples) if samples else "",
        "more": _settings(runs) + _checkpoints(runs) + _go_on(runs) + _versions(runs),
    }


def _how_to_read(runs: Sequence[RunRecord]) -> str:
    dashed = " Red dashes are alarms." if any(run.alarms for run in runs) else ""
    return f'<p class="soft">Over the steps of the run; hover, or focus and press the arrow keys, for values.{dashed}</p>'


def _head(runs: Sequence[RunRecord]) -> str:
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    cards = "".join(_card(run, colour, named=len(runs) > 1) for colour, run in enumerate(runs))
    tiles = "".join(_tile(*tile) for tile in _results(runs[0])) if len(runs) == 1 else ""
    results = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    return f'<h1>{text(title)}</h1><div class="runs">{cards}</div>{results}' + (_compared(runs) if len(runs) > 1 else "")


def _card(run: RunRecord, colour: int, named: bool) -> str:
    info = run.info
    state = str(info["state"])
    whole = run.settings.get("steps")
    last = max((record["step"] for record in run.records if is_number(record.get("step"))), default=None)
    steps = "no step yet" if last is None else f"step {last:g}" + (f" of {whole}" if is_number(whole) else "")
    stopped = info["error"] in (None, "", "StopRequested", "KeyboardInterrupt")  # which "interrupted" says
    error = "" if stopped else f'<p class="state">{text(info["error"])}</p>'
    return (
        f'<div class="run c{colour % COLOURS}">{f"<h3>{text(run.label)}</h3>" if named else ""}'
        f'<p>{text(run.command)}, <span class="state{" ok" if state in GOOD else ""}">{text(state)}</span>, {text(steps)}</p>'
        f'<p class="soft">{text(_times(info))}</p>{error}<p class="soft">{text(run.folder)}</p></div>'
    )


def _times(info: Mapping[str, Any]) -> str:
    try:
        begun = datetime.fromisoformat(str(info["started"]))
        ended = datetime.fromisoformat(str(info["finished"])) if info["finished"] else None
        shown = begun.strftime("%Y-%m-%d %H:%M UTC") if not begun.utcoffset() else begun.isoformat()
        return shown + (f", {_duration((ended - begun).total_seconds())}" if ended else "")
    except (ValueError, TypeError):
        return str(info["started"] or "")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _results(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and a remark of what came of a run."""
    for name, metric, key in (
        ("held-out score", "eval/scores", "eval_scores"),
        ("independent evaluator", "eval/independent", "eval_independent"),
    ):
        before, after = run.summary.get(f"{key}_before"), run.summary.get(f"{key}_after")
        values = run.series(metric)[1]
        before = before if is_number(before) else values[0] if len(values) > 1 else None
        after = after if is_number(after) else values[-1] if values else None
        error = run.summary.get(f"{key}_gain_se")
        if before is not None and after is not None:
            sure = f" ± {error:.2g}" if is_number(error) else ""
            yield name, f"{_short(before)} → {_short(after)}", f"{after - before:+.3g}{sure}"
        elif after is not None:
            yield name, _short(after), ""
    for name, metric, unit in (
        ("KL, held-out", "eval/kl", "nats"),
        ("held-out perplexity", "eval/perplexity", ""),
        ("pairs ranked correctly", "eval/reward_accuracy", "held-out"),
        ("answers", "time/responses_per_second", "per second"),
    ):
        if values := run.series(metric)[1]:
            yield name, _short(values[-1]), unit
    sizes = [size for name in {n for r in run.records for n in r if n.startswith("memory/")} for size in run.series(name)[1]]
    if sizes:
        card = card_of(run)
        yield "peak memory", f"{max(sizes) / MIB:,.0f} MiB", f"of {card[1] / MIB:,.0f}" if card else ""


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _tile(name: str, value: str, remark: str) -> str:
    small = f" <small>{text(remark)}</small>" if remark else ""
    return f'<div class="tile"><dt>{text(name)}</dt><dd>{text(value)}{small}</dd></div>'


def _compared(runs: Sequence[RunRecord]) -> str:
    results = [{name: f"{value} ({remark})" if remark else value for name, value, remark in _results(run)} for run in runs]
    names = dict.fromkeys(name for found in results for name in found)
    rows = [(name, *(found.get(name, "-") for found in results)) for name in names]
    shown = (
        table(("result", *(run.label for run in runs)), rows, caption="Results", right=range(1, len(runs) + 1)) if rows else ""
    )
    other = differing_settings(runs)
    headers = ("setting", *(run.label for run in runs))
    return shown + (
        table(headers, other, caption="Settings in which they differ") if other else "<p>They have the same settings.</p>"
    )


def _alarms(runs: Sequence[RunRecord]) -> str:
    shown = []
    for run in runs:
        by_name: dict[str, list[Mapping[str, Any]]] = {}
        for alarm in run.alarms:
            by_name.setdefault(str(alarm.get("name")), []).append(alarm)
        for name, found in by_name.items():
            steps = ", ".join(f"{alarm['step']:g}" for alarm in found[:12]) + (", ..." if len(found) > 12 else "")
            whose = f"{run.label}: " if len(runs) > 1 else ""
            at = f"step{'s' if len(found) > 1 else ''} {steps}"
            shown.append(
                f'<div class="alarm"><p><strong>{text(whose + name)}</strong> <span class="soft">at {text(at)}</span></p>'
                f"<p>{text(found[-1].get('line'))}</p></div>"
            )
    return "<h2>Alarms</h2>" + "".join(shown) if shown else ""


def _settings(runs: Sequence[RunRecord]) -> str:
    shown = []
    for run in runs:
        rows = changed_settings(run)
        named = f" of {run.label}" if len(runs) > 1 else ""
        if rows:
            shown.append(
                table(
                    ("setting", "value", "default"), rows, caption=f"Settings{named} that are not the defaults", wrapped=(1, 2)
                )
            )
        else:
            why = "all settings are the defaults" if run.settings else "config.yaml cannot be read"
            shown.append(f"<p>{text(run.label)}: {why}.</p>")
    return "<h2>Settings</h2>" + "".join(shown)


def _checkpoints(runs: Sequence[RunRecord]) -> str:
    shown = []
    for run in runs:
        rows = [
            (str(run.folder / "checkpoints" / found["name"]), f"{found['bytes'] / MIB:,.1f}")
            for found in run.info["checkpoints"]
        ]
        if rows:
            caption = f"Checkpoints of {run.label}" if len(runs) > 1 else ""
            shown.append(table(("folder", "MiB"), rows, caption=caption, right=(1,)))
    return "<h2>Checkpoints</h2>" + ("".join(shown) or "<p>None.</p>")


def _go_on(runs: Sequence[RunRecord]) -> str:
    shown = []
    for run in runs:
        named = f"<h3>{text(run.label)}</h3>" if len(runs) > 1 else ""
        lines = "".join(
            f'<p class="how">{text(what)}</p><pre class="command" tabindex="0"><code>{text(line)}</code></pre>'
            for what, line in commands(run)
        )
        shown.append(named + (lines or "<p>Nothing was saved to go on from.</p>"))
    return "<h2>How to go on</h2>" + "".join(shown)


def commands(run: RunRecord) -> list[tuple[str, str]]:
    """Return what can be done with a run now, and the line to type."""
    folder, config = as_typed(run.folder), as_typed(run.folder / "config.yaml")
    checkpoints = [str(found["name"]) for found in run.info["checkpoints"]]
    found = []
    if run.command in ("sft", "ppo"):
        longer = "--steps" if run.command == "ppo" else "--epochs"
        now = run.settings.get(longer.removeprefix("--"))
        if run.info["state"] == "finished" and checkpoints and now is not None and is_number(now):
            found.append(("Train for longer", f"hydra-ppo {run.command} {config} --resume {longer} {2 * now:g}"))
        elif run.info["state"] == "running":
            found.append(("Watch it", f"hydra-ppo report {folder} --live 8000"))
        elif run.info["state"] != "finished":
            found.append(("Go on where it stopped", f"hydra-ppo {run.command} {config} --resume"))
    saved = run.folder if (run.folder / MANIFEST).is_file() else None
    if saved is None and checkpoints:
        saved = run.folder / "checkpoints" / checkpoints[-1]
    if saved is not None:
        model, target = as_typed(saved), run.folder.resolve()
        role = "actor" if run.command == "ppo" else "reward"
        out = as_typed(run.folder.parent / f"{target.name}-{role}")
        exported = "" if role == "actor" else " --role reward"
        what = (
            "Write the trained policy as a plain model" if role == "actor" else "Write the reward model as a plain classifier"
        )
        found.append((what, f"hydra-ppo export {model} --output {out}{exported}"))
        asked = "--both" if role == "actor" else "--role reference"
        found.append(("Ask it something", f"hydra-ppo generate {model} --prompt 'Tell me about tea.' {asked}"))
        rows = run.settings.get("data.eval") or run.settings.get("data.train")
        if isinstance(rows, str) and run.command == "sft":
            found.append(("Score pairs with its reward head", f"hydra-ppo score {model} {as_typed(rows)}"))
        elif run.command == "ppo":
            found.append(("Score pairs, or prompts with answers", f"hydra-ppo score {model} pairs.jsonl"))
    return found


def _versions(runs: Sequence[RunRecord]) -> str:
    found = []
    for run in runs:
        packages = run.info["packages"] if isinstance(run.info["packages"], dict) else {}
        device = card_of(run)
        found.append(
            {"hydra-ppo": run.info["version"], "python": run.state.get("python"), **packages}
            | ({"device": device[0]} if device else {})
        )
    names = dict.fromkeys(name for run in found for name in run)
    rows = [(name, *(run.get(name) or "-" for run in found)) for name in names]
    headers = ("package", *(run.label for run in runs)) if len(runs) > 1 else ("package", "version")
    return "<h2>Versions</h2>" + table(headers, rows)
