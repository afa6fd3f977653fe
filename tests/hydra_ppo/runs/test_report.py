"""The page of a run: what it shows, of what runs, and that texts of others stay texts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.errors import ConfigError
from hydra_ppo.report.charts import Line, bar_chart, line_chart, number, ticks
from hydra_ppo.report.page import MARK, commands, report_at_end, report_html, write_report
from hydra_ppo.report.record import changed_settings, differing_settings, labels, read_runs
from hydra_ppo.report.samples import samples_of
from hydra_ppo.report.style import text
from tests.pages import HOSTILE, write_run


class Tags(HTMLParser):
    """Collects every tag with its attributes, and the text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("style", "script"):
            self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def page_of(*folders: Path) -> str:
    return report_html(read_runs(folders))


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0, 1, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.3, 1.1, 0, [0, 0.5, 1]),
        (0, 96, 1, [0, 20, 40, 60, 80]),
        (1, 3, 1, [1, 2, 3]),
        (2, 2, 0, [2]),
        (0, 7e-6, 0, [0, 2e-6, 4e-6, 6e-6]),
    ],
)
def test_ticks_are_round(low, high, least, expected):
    assert ticks(low, high, least=least) == pytest.approx(expected)


def test_numbers_are_short():
    assert [number(value) for value in (0.0, 0.59431, 12345.6, 3.114e-9, -2, float("nan"))] == [
        *("0", "0.5943", "12,346", "3.11e-09", "-2", "-"),
    ]
    assert [number(value, 0.25) for value in (0.5, 0.75, 1)] == ["0.5", "0.8", "1.0"]
    assert [number(value, 5e-6) for value in (0, 5e-6, 1.5e-5)] == ["0", "5e-6", "1.5e-5"]


def test_a_line_is_where_its_values_are():
    # 360 wide with 46 and 10 at the sides, 200 high with 10 and 24: from x=46, y=176 to x=350, y=10.
    chart = line_chart("t", "u", [Line("a", [0, 1, 4], [0.0, 1.0, 0.5])], limits=(0.0, 1.0))
    assert 'd="M46 176 L122 10 L350 93"' in chart
    assert 'data-steps="0 1 4" data-values="0 1 0.5"' in chart
    assert "a: 0 at step 0, 0.5 at step 4" in chart  # said in words


def test_a_long_line_keeps_its_spike():
    values = [0.0] * 5000
    values[1234] = 9.0
    chart = line_chart("t", "u", [Line("a", range(5000), values)])
    drawn = re.search(r'data-steps="([^"]*)" data-values="([^"]*)"', chart)
    steps, shown = drawn[1].split(), drawn[2].split()
    assert len(steps) < 700
    assert shown[steps.index("1234")] == "9"
    assert steps[0] == "0"
    assert steps[-1] == "4999"


def test_nothing_to_draw_is_no_chart():
    assert line_chart("t", "u", [Line("a", [], [])]) == ""
    assert bar_chart("t", []) == ""


def test_bars_stand_against_the_card():
    chart = bar_chart("Memory", [("rollout", "", 6 * 2**30, 0), ("update", "", 12 * 2**30, 0)], ("card", 24 * 2**30))
    # 24 GiB are 360 - 92 - 64 = 204 wide.
    assert re.findall(r'class="bar"[^>]*width="([\d.]+)"', chart) == ["51", "102"]
    assert "card: 24 GiB" in chart
    assert "12 GiB" in chart


def test_what_a_page_shows(run):
    words = Tags(page_of(run)).words
    for what in (
        *("ppo, finished , step 12 of 12", "0.5 → 1.5", "+1 ± 0.12", "over_optimisation at step 8", "raise kl.coef"),
        *("Score", "Independent evaluator", "KL from the reference", "Length", "Entropy", "Explained variance", "Clip share"),
        *("18 GiB", 'An "A10": 24 GiB', "plain tea", "steps 12 null", "transformers", "Nothing was saved"),
    ):
        assert what in words, what
    assert "learning_rate" not in words  # a default


def test_step_zero_is_in_the_curves(run):
    assert 'data-label="held-out" data-steps="0 4 8 12" data-values="0.5 0.833333 1.16667 1.5"' in page_of(run)


def test_texts_of_others_stay_texts(tmp_path):
    folder = write_run(tmp_path / '<b onclick="x">&amp;')
    page = Tags(page_of(folder))
    body = [tag for tag, _ in page.found[[tag for tag, _ in page.found].index("body") :]]
    assert set(body) <= {
        *(
            "body",
            "header",
            "main",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "p",
            "span",
            "strong",
            "small",
            "dl",
            "dt",
            "dd",
            "ul",
            "li",
        ),
        *("figure", "figcaption", "svg", "title", "line", "text", "path", "g", "circle", "rect", "article", "form", "label"),
        *("li", "input", "select", "option", "output", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "script"),
    }
    assert body.count("script") == 1
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on") or name in ("src", "href")]
    for hostile in HOSTILE[:5]:
        assert hostile in page.words, hostile
    policy = next(attributes["content"] for tag, attributes in page.found if "content" in attributes and tag == "meta")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_what_is_not_seen_is_named():
    shown = text("a\u202eb\x00c\ud800\u2028\t\r\nd\r")
    assert shown == "a[U+202E]b[U+0000]c[U+D800][U+2028]\t\nd[U+000D]"
    shown.encode()


def test_samples_stand_side_by_side(run):
    samples = samples_of(read_runs([run]))
    assert len(samples) == len(HOSTILE)
    third = samples[2]
    assert [(answer.label, answer.text, answer.score) for answer in third.answers] == [
        ("step 0", " plain tea", 0.25),
        ("step 12", " plain tea", 2.25),
    ]
    assert not third.changed
    assert third.difference == 2.0
    assert samples[1].changed


def test_samples_of_several_runs_share_their_before(tmp_path, run):
    other = write_run(tmp_path / "other", lift=-0.5)
    labels_ = [answer.label for answer in samples_of(read_runs([run, other]))[3].answers]
    assert labels_ == ["one, step 0", "one, step 12", "other, step 12"]
    assert samples_of(read_runs([run, other]))[3].difference == -1.5


def test_a_prompt_that_is_sampled_twice_in_a_step_is_two(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [{"step": step, "prompt": "p", "response": f"{step}{n}", "score": float(n)} for step in (1, 2) for n in (0, 1)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [[answer.text for answer in sample.answers] for sample in samples_of(read_runs([folder]))]
    assert found == [["10", "20"], ["11", "21"]]


def test_settings_beside_their_defaults(tmp_path, run):
    found = {name: (value, default) for name, value, default in changed_settings(read_runs([run])[0])}
    assert found["steps"] == ("12", "null")
    assert found["data.train"] == ("prompts.jsonl", "required")
    assert found["run.progress"] == ("false", "true")
    assert set(found) == {"model.name_or_path", "data.train", "run.progress", "steps"}
    other = write_run(tmp_path / "other", ppo_epochs=2)
    assert ("ppo_epochs", "4", "2") in differing_settings(read_runs([run, other]))


def test_runs_are_told_apart_by_the_end_of_their_paths(tmp_path):
    assert labels([tmp_path / "a" / "ppo", tmp_path / "b" / "ppo"]) == ["a/ppo", "b/ppo"]
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_how_to_go_on(tmp_path):
    folder = write_run(tmp_path / "my run", finished=False)
    (folder / "checkpoints" / "step-000008").mkdir(parents=True)
    typed = [line for _, line in commands(read_runs([folder])[0])]
    config, checkpoint = f"'{folder}/config.yaml'", f"'{folder}/checkpoints/step-000008'"
    assert typed == [
        f"hydra-ppo ppo {config} --resume",
        f"hydra-ppo export {checkpoint} --output '{tmp_path}/my run-actor'",
        f"hydra-ppo generate {checkpoint} --prompt 'Tell me about tea.' --both",
        f"hydra-ppo score {checkpoint} pairs.jsonl",
    ]
    done = write_run(tmp_path / "done")
    (done / "checkpoints" / "step-000012").mkdir(parents=True)
    (done / "hydra.json").write_text("{}")
    typed = [line for _, line in commands(read_runs([done])[0])]
    assert typed[0] == f"hydra-ppo ppo {done}/config.yaml --resume --steps 24"
    assert typed[1] == f"hydra-ppo export {done} --output {tmp_path}/done-actor"


def test_a_run_that_is_being_written(tmp_path):
    """Half a last line, half a letter, no summary, a checkpoint that is being written."""
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text('{"eval_scores_be')
    (folder / "checkpoints" / ".writing-step-000013").mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl"):
        with (folder / name).open("ab") as file:
            file.write('{"step": 13, "objective/scores": 3, "prompt": "é'.encode()[:-1])
    words = Tags(page_of(folder)).words
    assert "0.5 → 1.5" in words  # of the metrics, since no summary says it
    assert "step 12: rollouts 1.5" in words
    assert ".writing" not in words


def test_nothing_was_measured_yet(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("samples.jsonl", "alarms.jsonl", "summary.json"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text("")
    words = Tags(page_of(folder)).words
    assert "No metrics yet." in words
    assert "Samples" not in words


def test_a_run_of_an_older_version(tmp_path):
    """Fewer keys, a setting that is gone, NaN as Python writes it, numbers that are none."""
    folder = write_run(tmp_path / "run")
    (folder / "state.json").write_text('{"command": "ppo", "state": "finished"}')
    (folder / "config.yaml").write_text("steps: 7\nold_setting: true\n")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "objective/scores": NaN, "eval/kl": "x"}\n{"step": 2, "objective/scores": 2.5, "eval/kl": null}\n'
        '{"objective/kl": Infinity}\n{"step": NaN, "objective/scores": 1}\n'
    )
    words = Tags(page_of(folder)).words
    assert "old_setting true not a setting of this version" in words
    assert "step 2: 2.5" in words
    assert "nan" not in re.sub(r"[^a-z]", " ", words).split()


def test_the_page_is_written_beside_the_run(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Page: {run}/report.html\n"
    assert (run / "report.html").read_text().startswith(f"<!DOCTYPE html>\n{MARK}\n<html")


def test_another_file_is_left_alone(run, tmp_path, capsys):
    own = tmp_path / "own.html"
    own.write_text("mine")
    assert main(["report", str(run), "--output", str(own)]) == 2
    assert capsys.readouterr().err == f"output='{own}' is there and is no page of this program; choose another file.\n"
    assert own.read_text() == "mine"
    assert write_report([run], tmp_path / "new" / "x.html").exists()
    write_report([run], tmp_path / "new" / "x.html")  # its own it writes anew


@pytest.mark.parametrize("case", ["missing", "no run", "broken", "twice", "both"])
def test_what_cannot_be_shown_is_one_line(run, tmp_path, capsys, case):
    folder, more = tmp_path / "folder", []
    if case != "missing":
        folder.mkdir()
    if case == "broken":
        shutil.copytree(run, folder, dirs_exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    if case in ("twice", "both"):
        folder = run
        more = [f"{run}/../{run.name}"] if case == "twice" else ["--live", "0", "--output", "x.html"]
    assert main(["report", str(folder), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    said = {"missing": "is not a folder", "no run": "not a run", "broken": "line 2", "twice": "once", "both": "leave one out"}
    assert said[case] in err


def test_a_page_that_cannot_be_written_is_a_warning(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink(missing_ok=True)
    (folder / "report.html").mkdir()
    line = report_at_end(folder)
    assert line.startswith("warning: report.html was not written: output=")
    assert "\n" not in line
    (folder / "metrics.jsonl").write_text("broken\n{}\n")
    assert "line 1: not a JSON object" in report_at_end(folder)
    assert report_at_end(tmp_path / "gone").startswith("warning: report.html was not written: ")
    with pytest.raises(ConfigError, match=r"cannot be written \(File exists\)"):
        write_report([run], run / "state.json" / "x.html")


def test_it_needs_no_torch(run, tmp_path):
    code = (
        "import sys; from hydra_ppo.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "report", str(run), "--output", str(tmp_path / "x.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.stdout.splitlines()[-1] == "[]"
