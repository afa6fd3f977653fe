"""`hydra-ppo reward-eval`: its numbers against those of score, generate and the judge."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from hydra_ppo.algorithms.calibration import expected_calibration_error
from hydra_ppo.algorithms.reliability import length_r2
from hydra_ppo.cli.main import main
from hydra_ppo.model.hydra import HydraModel
from tests.hydra_ppo.cli.judges import low_words
from tests.hydra_ppo.cli.reward_project import make_project, ppo_settings, write
from tests.hydra_ppo.cli.test_score_generate import call, encoded, read_rows

JUDGE = "tests.hydra_ppo.cli.judges:low_words"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    settings = ppo_settings(folder, folder / "ppo", [{"kind": "head"}], steps=1)
    assert main(["ppo", write(folder / "ppo.yaml", settings)]) == 0
    return folder


def test_pairs_are_measured_as_score_scores_them(project, tmp_path, capsys):
    run, data = project / "sft", project / "held_out.jsonl"
    assert call(capsys, "score", run, data, "--output", tmp_path / "s.jsonl")[0] == 0
    code, out, _ = call(capsys, "reward-eval", run, data, "--best-of", "0", "--output", tmp_path / "e.json")
    assert code == 0
    lines, found = read_rows(tmp_path / "s.jsonl"), json.loads((tmp_path / "e.json").read_text())
    margins = [line["margin"] for line in lines]
    share = sum(margin > 0 for margin in margins) / 24
    assert found["accuracy"] == pytest.approx(share)
    assert found["accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / 24))
    assert found["ece"] == pytest.approx(expected_calibration_error(torch.tensor(margins)).item(), abs=1e-5)
    scores = [line[name] for name in ("chosen_score", "rejected_score") for line in lines]
    rows = read_rows(data)
    lengths = [
        len(encoded(*row["prompt"], *row[name])) - len(encoded(*row["prompt"]))
        for name in ("chosen", "rejected")
        for row in rows
    ]
    assert found["length_r2"] == pytest.approx(length_r2(scores, lengths), abs=1e-4)
    assert found["score_mean"] == pytest.approx(statistics.fmean(scores), abs=1e-4)
    assert found["score_sd"] == pytest.approx(statistics.pstdev(scores), abs=1e-4)
    assert "best_of_gain" not in found
    assert f"{found['ece']:.4f}" in out
    groups = found["clusters"]
    assert sum(group["answers"] for group in groups) == 48
    mean = sum(group["answers"] * group["score_mean"] for group in groups) / 48
    assert mean == pytest.approx(found["score_mean"], abs=1e-6)
    assert len(groups) > 1


def test_samples_of_the_policy_and_what_a_judge_says(project, tmp_path, capsys):
    run, data = project / "ppo", project / "held_out.jsonl"
    options = ["--best-of", "4", "--prompts", "6", "--max-new-tokens", "5", "--seed", "3", "--clusters", "0"]
    code, out, _ = call(capsys, "reward-eval", run, data, *options, "--judge", JUDGE, "--output", tmp_path / "e.json")
    assert code == 0
    found = json.loads((tmp_path / "e.json").read_text())
    # generate draws the same answers of the same prompts.
    (tmp_path / "six.jsonl").write_text("\n".join(json.dumps(row) for row in read_rows(data)[:6]))
    command = ["generate", run, "--prompts", tmp_path / "six.jsonl", "--samples", "4", "--max-new-tokens", "5", "--seed", "3"]
    assert call(capsys, *command, "--output", tmp_path / "g.jsonl")[0] == 0
    answers = [line["actor"] for line in read_rows(tmp_path / "g.jsonl")]
    scores = [[answer["score"] for answer in answers[i : i + 4]] for i in range(0, 24, 4)]
    # generate shows special tokens, reward functions do not see them.
    said = [" ".join(word for word in answer["response"].split() if not word.startswith("<")) for answer in answers]
    judged = [low_words([""] * 4, said[i : i + 4]) for i in range(0, 24, 4)]
    assert found["policy_score"] == pytest.approx(statistics.fmean(v for row in scores for v in row), abs=1e-4)
    gains = [max(row) - statistics.fmean(row) for row in scores]
    assert found["best_of_gain"] == pytest.approx(statistics.fmean(gains), abs=1e-4)
    assert found["best_of_gain_se"] == pytest.approx(statistics.stdev(gains) / math.sqrt(6), abs=1e-4)
    best = [row[own.index(max(own))] - statistics.fmean(row) for own, row in zip(scores, judged, strict=True)]
    assert found["judged_gain"] == pytest.approx(statistics.fmean(best), abs=1e-6)
    assert found["judge_best_gain"] == pytest.approx(statistics.fmean(max(row) - statistics.fmean(row) for row in judged))
    ordered = [(own, row) for own, row in zip(scores, judged, strict=True) if row[0] != row[1]]
    assert found["policy_pairs"] == len(ordered) > 0
    right = sum((own[0] > own[1]) == (row[0] > row[1]) for own, row in ordered)
    assert found["policy_accuracy"] == pytest.approx(right / len(ordered))
    assert "best of 4 of the actor" in out
    assert found["clusters"] == []


def test_heads_of_a_folder(project, tmp_path, capsys):
    """Of a head that was never trained nothing can be said, of heads on its states much."""
    HydraModel.from_pretrained(project / "base", train="ppo").save_pretrained(tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (project / "base" / name).is_file():
            (tmp_path / "run" / name).write_bytes((project / "base" / name).read_bytes())
    data = project / "pairs.jsonl"
    code, _, err = call(capsys, "reward-eval", tmp_path / "run", data)
    assert (code, "was never trained and says nothing; name heads with --heads" in err) == (2, True)
    assert call(capsys, "features", tmp_path / "run", data, "--output", tmp_path / "f")[0] == 0
    assert call(capsys, "heads", tmp_path / "f", "--output", tmp_path / "h", "--kind", "linear")[0] == 0
    options = ["--best-of", "0", "--output", tmp_path / "e.json"]
    assert call(capsys, "reward-eval", tmp_path / "run", data, "--heads", tmp_path / "h", *options)[0] == 0
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] > 0.8
    code, _, err = call(capsys, "reward-eval", project / "sft", data, "--heads", tmp_path / "h", "--best-of", "0")
    assert (code, "was trained on states of another reward adapter" in err) == (2, True)


def test_bad_input_is_one_line(project, tmp_path, capsys):
    run, data = project / "sft", project / "held_out.jsonl"
    (tmp_path / "there.json").write_text("")
    for argv, message in (
        ([project / "base", data], "holds no hydra.json"),
        ([run, data, "--best-of", "1"], "compares an answer with itself"),
        ([run, data, "--best-of", "0", "--judge", JUDGE], "--judge judges sampled answers"),
        ([run, data, "--judge", "nonsense"], "is not of the form package.module:function"),
        ([run, data, "--judge", "tests.hydra_ppo.cli.judges:no_such"], "no_such"),
        ([run, data, "--judge", "tests.hydra_ppo.cli.judges:wants_a_column"], "takes 'answer'"),
        ([run, data, "--output", tmp_path / "there.json"], "is there already"),
        ([run, project / "open.jsonl"], "has pairs without a label"),
        ([run, data, "--heads", tmp_path], "holds no heads.json"),
    ):
        code, _, err = call(capsys, "reward-eval", *argv)
        lines = [line for line in err.splitlines() if "attention=auto" not in line]
        assert (code, len(lines), message in err) == (2, 1, True), err
