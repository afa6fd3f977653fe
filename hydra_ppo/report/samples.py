"""Samples of a run side by side: what was answered before, and what after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_ppo.report.charts import number
from hydra_ppo.report.record import RunRecord, is_number
from hydra_ppo.report.style import text
from hydra_ppo.runs.contents import SAMPLES

MOST = 200
"""Prompts on a page."""
LONGEST = 4000
"""Characters of a text on a page."""


@dataclass(frozen=True)
class Answer:
    """What was answered, and what it was given for it."""

    label: str
    text: str
    score: float | None
    independent: float | None


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers, the earliest first."""

    prompt: str
    answers: Sequence[Answer]

    @property
    def difference(self) -> float | None:
        """Score of the last answer minus that of the first; None where there are not two."""
        first, last = self.answers[0].score, self.answers[-1].score
        return None if len(self.answers) < 2 or first is None or last is None else last - first

    @property
    def changed(self) -> bool:
        """Whether its answers are not all the same."""
        return len({answer.text for answer in self.answers}) > 1


Key = tuple[str, int]
Ends = dict[Key, tuple[Mapping[str, Any], Mapping[str, Any]]]


def read_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of ``samples.jsonl``; a line that is half written, or none of ours, is passed over."""
    try:
        with (folder / SAMPLES).open("rb") as file:
            for line in file:  # bytes: a text would also end at what answers may hold, such as U+2028
                try:
                    record = json.loads(line.decode("utf-8", errors="replace"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and is_number(record.get("step")) and "response" in record:
                    yield record
    except OSError:
        return


def first_and_last(records: Iterator[dict[str, Any]]) -> Ends:
    """Return the earliest and the latest sample of each prompt; of a run that has samples of an evaluation, those alone."""
    found: dict[bool, Ends] = {True: {}, False: {}}
    seen: dict[tuple[bool, float, str], int] = {}
    for record in records:
        held_out, prompt = bool(record.get("held_out")), str(record.get("prompt"))
        again = (held_out, record["step"], prompt)  # a prompt that is sampled twice in a step is two
        key = (prompt, seen.get(again, 0))
        seen[again] = key[1] + 1
        first, _ = found[held_out].get(key, (record, record))
        found[held_out][key] = (first, record)
    return found[True] or found[False]


def samples_of(runs: Sequence[RunRecord]) -> list[Sample]:
    """Return the samples of some runs by prompt: the earliest of all, then the latest of each."""
    ends = [first_and_last(read_samples(run.folder)) for run in runs]
    found = []
    for key in dict.fromkeys(key for run in ends for key in run):
        answers: list[Answer] = []
        for run, own in zip(runs, ends, strict=True):
            if key not in own:
                continue
            first, last = own[key]
            name = f"{run.label}, " if len(runs) > 1 else ""
            if not answers and first["step"] != last["step"]:
                answers.append(_answer(f"{name}step {first['step']:g}", first))
            answers.append(_answer(f"{name}step {last['step']:g}", last))
        found.append(Sample(key[0], answers))
    return sorted(found, key=lambda sample: -len(sample.answers))  # those that can be compared come first


def _answer(label: str, record: Mapping[str, Any]) -> Answer:
    score, judged = (record.get(name) if is_number(record.get(name)) else None for name in ("score", "independent"))
    return Answer(label, str(record.get("response")), score, judged)


def samples_html(samples: Sequence[Sample]) -> str:
    """Return samples as HTML; all of it is escaped here."""
    shown = "".join(_sample(sample) for sample in samples[:MOST])
    rest = len(samples) - MOST
    more = f'<p class="soft">{rest:,} more prompts are in samples.jsonl.</p>' if rest > 0 else ""
    return f'<div class="samples">{shown}</div>{more}'


def _sample(sample: Sample) -> str:
    difference = sample.difference
    said = "" if difference is None else f'<span class="tag">score {difference:+.3g}</span>'
    answers = "".join(
        f'<div class="answer"><h4>{text(answer.label)}{_scores(answer)}</h4><p dir="auto">{_text(answer.text)}</p></div>'
        for answer in sample.answers
    )
    return (
        f'<article class="sample" data-difference="{"" if difference is None else f"{difference:.6g}"}" '
        f'data-changed="{int(sample.changed)}"><div class="prompt"><p dir="auto">{_text(sample.prompt)}</p>{said}</div>'
        f'<div class="answers">{answers}</div></article>'
    )


def _scores(answer: Answer) -> str:
    parts = [("score", answer.score), ("evaluator", answer.independent)]
    return "".join(f' <span class="soft">{name} {text(number(value))}</span>' for name, value in parts if value is not None)


def _text(value: str) -> str:
    value = value.removeprefix(" ")  # which parts an answer from its prompt
    rest = len(value) - LONGEST
    cut = f' <span class="soft">({rest:,} more characters)</span>' if rest > 0 else ""
    return (text(value[:LONGEST]) or '<span class="soft">(empty)</span>') + cut


FILTER = """
<form class="filter" id="filter">
<label>Search <input type="search" id="find" autocomplete="off"></label>
<label><input type="checkbox" id="changed"> only changed</label>
<label>Order <select id="order"><option value="">as sampled</option><option value="-1">score, most gained first</option>
<option value="1">score, most lost first</option></select></label>
<output id="count" class="soft"></output>
</form>
"""

SAMPLES_STYLE = """
.filter { display: flex; flex-wrap: wrap; gap: 0.5rem 1.25rem; align-items: center; margin: 0 0 1rem; font-size: 0.9rem; }
.filter input[type=search], .filter select { font: inherit; padding: 0.25rem 0.4rem; color: inherit; background: var(--paper);
  border: 1px solid var(--rule); border-radius: 4px; max-width: 100%; }
.samples { display: flex; flex-direction: column; gap: 0.75rem; }
.sample { border: 1px solid var(--rule); border-radius: 6px; background: var(--card); overflow: hidden; }
.sample[hidden] { display: none; }
.sample p { margin: 0; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font-size: 0.9rem; }
.prompt { display: flex; gap: 0.75rem; justify-content: space-between; align-items: flex-start; padding: 0.5rem 0.75rem;
  background: var(--band); }
.tag { font-size: 0.8rem; white-space: nowrap; color: var(--soft); font-variant-numeric: tabular-nums; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.answer { padding: 0.5rem 0.75rem 0.75rem; min-width: 0; }
.answer h4 { margin: 0 0 0.15rem; font-size: 0.8rem; }
.answer h4 .soft { font-weight: 400; margin-left: 0.5rem; }
"""
