"""`hydra-ppo label-next` and `self-label` on stored states and on texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.rewards.features import open_features
from hydra_ppo.rewards.head_training import LabelledPairs, margins_of, measure
from hydra_ppo.rewards.stored_heads import read_heads
from tests.hydra_ppo.cli.reward_project import make_features, make_project
from tests.hydra_ppo.cli.test_score_generate import call, read_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    for name in ("pairs", "open"):
        command = ["features", str(folder / "sft"), str(folder / f"{name}.jsonl"), "--output", str(folder / f"of_{name}")]
        assert main(command) == 0
    assert main(["heads", str(folder / "of_pairs"), "--output", str(folder / "once"), "--kind", "one-pass"]) == 0
    return folder


class TestLabelNext:
    def test_texts_and_stored_states_name_the_same_pairs(self, project, tmp_path, capsys):
        command = ["label-next", project / "of_open", "--head", project / "once", "--count", "5"]
        code, out, _ = call(capsys, *command, "--output", tmp_path / "a.jsonl")
        assert code == 0
        assert "5 of 16 pairs without a label" in out
        texts = ["label-next", project / "open.jsonl", "--run", project / "sft", *command[2:]]
        assert call(capsys, *texts, "--output", tmp_path / "b.jsonl")[0] == 0
        stored, fresh = read_rows(tmp_path / "a.jsonl"), read_rows(tmp_path / "b.jsonl")
        rows = read_rows(project / "open.jsonl")
        assert [line["responses"] for line in stored] == [line["responses"] for line in fresh]
        for one, other in zip(stored, fresh, strict=True):
            assert {"prompt": one["prompt"], "responses": one["responses"]} in rows
            assert one["uncertainty"] == pytest.approx(other["uncertainty"], rel=1e-2)
        assert [line["uncertainty"] for line in stored] == sorted((line["uncertainty"] for line in stored), reverse=True)

    def test_the_first_is_the_most_uncertain(self, project, tmp_path, capsys):
        output = tmp_path / "all.jsonl"
        command = ["label-next", project / "of_open", "--head", project / "once", "--output", output]
        assert call(capsys, *command)[0] == 0
        head, features = read_heads(project / "once"), open_features(project / "of_open")
        states = np.asarray(features.states, dtype=np.float64)
        z = (states[:, 0] - states[:, 1]) / head.scale.double().numpy()
        width = np.sqrt(np.einsum("nd,de,ne->n", z, head.inverse.double().numpy(), z))
        lines = read_rows(output)
        assert len(lines) == 16
        assert lines[0]["uncertainty"] == pytest.approx(width.max(), rel=1e-4)
        assert lines[0]["responses"][0] == features.rows()[int(width.argmax())]["chosen"]

    def test_bad_input_is_one_line(self, project, tmp_path, capsys):
        linear = tmp_path / "linear"
        assert call(capsys, "heads", project / "of_pairs", "--output", linear, "--kind", "linear")[0] == 0
        other = make_features(tmp_path / "other", 20)
        once = ["--head", project / "once"]
        for argv, message in (
            ([project / "of_open", "--head", linear], "holds linear heads, which know nothing of their uncertainty"),
            ([project / "of_pairs", *once], "has no pair without a label"),
            ([project / "open.jsonl", *once], "name the run whose states are read with --run"),
            ([project / "of_open", *once, "--run", project / "sft"], "do not go with stored states"),
            ([project / "of_open", "--head", tmp_path], "holds no heads.json"),
            ([project / "of_open", *once, "--count", "0"], "'0' is not a whole number of 1 or more"),
            ([project / "of_open", *once, "--run", "nowhere"], "nowhere is not a folder"),
        ):
            code, _, err = call(capsys, "label-next", *argv)
            assert (code, err.count("\n"), message in err) == (2, 1, True), err
        pairs = np.load(other / "pairs.npy")
        pairs[:, 3] = 0
        np.save(other / "pairs.npy", pairs)
        code, _, err = call(capsys, "label-next", other, *once)
        assert (code, "was trained on states of another reward adapter" in err) == (2, True)


class TestSelfLabel:
    OPTIONS = ("--members", "2", "--labelled", "0.2", "--held-out", "0.4")

    def test_rounds_leave_pairs_heads_and_a_report(self, tmp_path, capsys):
        folder, output = make_features(tmp_path / "f", 600, noise=0.5), tmp_path / "out"
        code, out, _ = call(capsys, "self-label", folder, "--output", output, *self.OPTIONS)
        assert code == 0
        said = json.loads((output / "rounds.json").read_text())
        assert (said["labelled"], said["held_out"]) == (72, 48)
        assert said["accuracy"] >= said["seed_accuracy"] - said["accuracy_se"]
        assert "round 1: easy pairs" in out
        pairs = read_rows(output / "pairs.jsonl")
        by_heads = [row for row in pairs if row["labelled_by"] != "data"]
        assert len(pairs) == said["labelled"] + said["self_labelled"] == 72 + len(by_heads)
        assert len(by_heads) > 100
        # The order in the data was the label, which the heads did not see.
        agreed = sum(row["chosen"].startswith("a") for row in by_heads)
        assert said["agreement"] == pytest.approx(agreed / len(by_heads))
        assert 0.75 < said["agreement"] < 1
        assert all(row["chosen"][1:] == row["rejected"][1:] for row in pairs)
        held = {row["prompt"] for row in read_rows(output / "held_out.jsonl")}
        assert len(held) == 48
        assert held.isdisjoint(row["prompt"] for row in pairs)
        # The heads are those that the report speaks of.
        features = open_features(folder)
        rows = [number for number, row in enumerate(features.rows()) if row["prompt"] in held]
        found = measure(margins_of(read_heads(output / "heads"), LabelledPairs(features.states), rows))
        assert found["accuracy"] == pytest.approx(said["accuracy"])

    def test_what_has_no_label_is_labelled(self, tmp_path, capsys):
        folder = make_features(tmp_path / "f", 400, noise=0.3)
        pairs = np.load(folder / "pairs.npy")
        pairs[150:, 3] = 0
        np.save(folder / "pairs.npy", pairs)
        code, out, _ = call(capsys, "self-label", folder, "--output", tmp_path / "out", *self.OPTIONS[:2])
        assert code == 0
        assert "120 labels to begin with, 30 held out, 250 pairs without a label" in out
        said = json.loads((tmp_path / "out" / "rounds.json").read_text())
        assert said["agreement"] is None
        assert said["self_labelled"] > 50

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        folder = make_features(tmp_path / "f", 40)
        for argv, message in (
            ([folder, "--output", tmp_path / "x"], "has a label for every pair; --labelled 0.15 begins with a share"),
            ([folder, "--output", tmp_path / "x", "--labelled", "0"], "'0' is not a number between 0 and 1"),
            ([folder, "--output", tmp_path / "x", "--kind", "one-pass"], "invalid choice: 'one-pass'"),
            ([folder, "--output", folder], "is not empty; choose another folder"),
            ([tmp_path / "no", "--output", tmp_path / "x"], "holds no features.json"),
        ):
            code, _, err = call(capsys, "self-label", *argv)
            assert (code, err.count("\n"), message in err) == (2, 1, True), err
        assert not (tmp_path / "x").exists()
