"""`hydra-ppo compare`, and what `inspect` says of evaluations and files."""

from __future__ import annotations

import json

from hydra_ppo.cli.main import main
from tests.run_folders import write_run


def test_two_runs_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first, second = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2, steps=4, finished=False)
    assert main(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["run.seed", "1", "2"] in rows
    assert ["state", "finished", "interrupted"] in rows
    assert ["last step", "12", "4"] in rows
    assert ["score on held-out prompts", "1.25 (+1 ± 0.125)", "1.25 (+1)"] in rows
    assert "run.output" not in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_what_an_older_run_does_not_name_is_the_default(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", keep_last=7)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(
        "".join(line + "\n" for line in config.splitlines() if "kl:" not in line and "coef: 0.05" not in line)
    )
    assert main(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "run.keep_last" in out
    assert "run.keep_best" not in out


def test_bad_input_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    (tmp_path / "no").mkdir()
    capsys.readouterr()
    for argv, message in (
        ([run], "compare was given one run; name two or more, or use hydra-ppo inspect."),
        ([run, tmp_path / "no"], "holds no state.json, so it is not a run"),
        ([run, run], "name each run once."),
    ):
        assert main(["compare", *map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert (err.count("\n"), message in err) == (1, True), err


def test_inspect_shows_the_gain_and_names_the_files(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "score on held-out prompts" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["0.25", "1.25", "1 ± 0.125", "0 to 12"]
    assert "summary.json, the result" in out
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outcomes"][0]["gain"] == 1.0
    assert found["files"] == ["summary.json", "metrics.jsonl", "samples.jsonl", "alarms.jsonl", "config.yaml", "log.txt"]
