"""The page of a run: what it says, what it must not let through, and what it is refused for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.errors import ConfigError
from hydra_ppo.report.document import shown
from hydra_ppo.report.gathered import before_and_after, labels
from hydra_ppo.report.page import LONGEST, MOST_SAMPLES, report_of, write_report
from tests.hydra_ppo.report.runs import HOSTILE, write_run


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def test_what_a_page_says(run):
    page = Elements(report_of([run]))
    for said in (
        f"{run} is ppo: finished, step 12",
        "score on held-out prompts",
        "1 ± 0.125",  # 0.25 -> 1.25, with the standard error of summary.json
        "step 0 to 12",
        "kl_budget",
        "the KL is 3.5 nats; raise kl.coef",
        f"hydra-ppo export {run} --output exported",
        f"hydra-ppo ppo {run}/config.yaml --resume --steps N",
        "Answers to the same held-out prompts at step 0 and at step 12.",
    ):
        assert said in page.text, said
    pictures = [attributes["aria-label"] for tag, attributes in page.found if tag == "svg"]
    assert [label.split(",")[0] for label in pictures] == [
        *("Score", "KL from the reference", "Response length", "Entropy", "Explained variance of the critic"),
        *("Share of clipped tokens", "Peak memory by phase"),
    ]
    assert "held-out goes from 0.25 at step 0 to 1.25 at step 12" in pictures[0]
    assert "critic goes from 0.5 at step 3 to 0.5 at step 12" in pictures[4]  # what was not measured is skipped
    assert pictures[-1] == "Peak memory by phase, MiB: rollout 3; update-actor 2"


def test_only_settings_that_differ_are_shown(tmp_path):
    page = report_of([write_run(tmp_path / "run", seed=7, keep_last=5)])
    table = page[page.index("What differs from the defaults") :]
    names = re.findall(r"<tr><td>([a-z_.]+)</td>", table[: table.index("</table>")])
    assert names == ["model.name_or_path", "data.train", "run.output", "run.seed", "run.keep_last", "run.progress"]


def test_nothing_that_a_model_says_is_markup(run):
    """Nothing asks for anything, runs anything or hides anything, whatever stands in samples."""
    page = report_of([run])
    elements = Elements(page)
    assert [tag for tag, _ in elements.found if tag in ("script", "img", "iframe", "object", "base", "form")] == ["script"]
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")], (
            tag,
            attributes,
        )
        assert not attributes.get("href", "data:,").startswith("http")
    assert "</script><img src=x onerror=" in elements.text  # as text, to be read
    assert "\\u202e" in elements.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", page)
    policy = next(attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_what_cannot_be_seen_is_spelled_out():
    assert shown("a\u202eb\u200bc\x00\ud800\n\td") == "a\\u202eb\\u200bc\\u0000\\ud800\n\td"
    assert shown("été, 日本語, 🙂 <&>\"'") == "été, 日本語, 🙂 &lt;&amp;&gt;&quot;&#x27;"


def test_answers_are_paired_by_prompt_and_place():
    def row(step, prompt, response, **more):
        return {"step": step, "prompt": prompt, "response": response, "held_out": True, "score": 1.0, **more}

    rows = [
        *(row(0, "a", "a0"), row(0, "b", "b0"), row(0, "a", "a0 again"), row(5, "a", "between")),
        *(row(9, "b", "b9", score=None), row(9, "a", "a9"), row(9, "a", "a9 again"), row(9, "c", "new")),
        *({"step": 9, "prompt": "a", "response": "of a rollout"}, {"prompt": "a", "response": "x", "held_out": True}),
    ]
    pairs, steps = before_and_after(rows)
    assert steps == (0, 9)
    assert [(pair.prompt, pair.before, pair.after, pair.scores[1]) for pair in pairs] == [
        ("a", "a0", "a9", 1.0),
        ("b", "b0", "b9", None),
        ("a", "a0 again", "a9 again", 1.0),
    ]
    assert before_and_after(rows[:3]) == ([], None)


def test_samples_without_an_evaluation_are_shown_as_they_are(tmp_path):
    rows = [
        {"prompt": f"p{i}", "response": "long " * 1000 if i == 0 else "short", "score": 0.5} for i in range(MOST_SAMPLES + 3)
    ]
    page = report_of([write_run(tmp_path / "run", samples=rows)])
    assert f"The first {MOST_SAMPLES} of {MOST_SAMPLES + 3}; samples.jsonl has all." in page
    assert f"[{5000 - LONGEST} more letters]" in page
    assert "Samples before and after" not in page


def test_several_runs_over_one_another(tmp_path):
    first, second = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b <i>", seed=2, steps=4)
    page = Elements(report_of([first, second]))
    score = next(attributes["aria-label"] for tag, attributes in page.found if tag == "svg")
    assert "a, rollout goes from 0.1 at step 1 to 1.2 at step 12" in score
    assert "b <i>, held-out goes from 0.25 at step 0 to 1.25 at step 4" in score
    assert "In which the runs differ" in page.text
    assert "run.seed" in page.text
    assert "run.output" not in page.text[page.text.index("In which the runs differ") :]
    assert "i" not in [tag for tag, _ in page.found]
    with pytest.raises(ConfigError, match=r"^runs: one of them is named twice; name each once\.$"):
        report_of([first, first])


def test_runs_are_called_by_what_they_do_not_share():
    assert labels([Path("runs/a")]) == ["runs/a"]
    assert labels([Path("runs/x/ppo"), Path("runs/y/ppo")]) == ["x/ppo", "y/ppo"]
    assert labels([Path("runs"), Path("runs/a")]) == ["runs", "runs/a"]


def test_the_card_stands_beside_the_peaks(tmp_path):
    page = report_of([write_run(tmp_path / "run", device=("RTX <1>", 8 * 2**30))])
    assert "Peak memory by phase, GiB: rollout 0.00293; update-actor 0.001953; RTX &lt;1&gt; 8" in page


def test_a_run_that_goes_on_or_was_cut_or_is_of_before(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "objective/scores": NaN}\n{"step": 14, "objecti')  # half a line, while it is being written
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps({key: state[key] for key in ("command", "state", "pid")})
    )  # of an older version
    page = report_of([folder])
    assert f"hydra-ppo ppo {folder}/config.yaml --resume " in page
    assert "interrupted, step 13" in page
    (folder / "config.yaml").write_text("[")
    assert "config.yaml cannot be read." in report_of([folder])
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "alarms.jsonl"):
        (folder / name).unlink(missing_ok=True)
    assert "Nothing has been logged yet." in report_of([folder])


def test_the_command_writes_the_page_and_refuses_in_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Wrote {run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(run), str(write_run(tmp_path / "b"))]) == 0
    assert (tmp_path / "report.html").is_file()
    capsys.readouterr()
    (tmp_path / "no").mkdir()
    for argv, message in (
        ([tmp_path / "no"], "holds no state.json, so it is not a run"),
        ([tmp_path / "none"], "is not a folder; name a run folder."),
        ([run, "--output", tmp_path], "cannot be written (Is a directory); choose another file."),
        ([run, "--live", "0", "--output", "x.html"], "--live serves the page and --output writes it; leave one out."),
        ([run, "--live", "70000"], "live=70000 cannot be served"),
        ([run, run], "one of them is named twice"),
    ):
        assert main(["report", *map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert (err.count("\n"), message in err) == (1, True), err


def test_a_page_needs_no_torch(run, tmp_path):
    code = (
        "import sys; from pathlib import Path; from hydra_ppo.cli.main import main; "
        f"main(['report', {str(run)!r}, '--output', {str(tmp_path / 'p.html')!r}]); "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^output=.* cannot be written \(.*\); choose another file\.$"):
        write_report([run], tmp_path / "file" / "page.html")


def test_the_hostile_text_is_as_bad_as_it_looks():
    assert HOSTILE in f"<script>{HOSTILE}"  # the constant itself is not escaped
    assert "<img" in HOSTILE
