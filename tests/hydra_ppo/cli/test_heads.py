"""`hydra-ppo features` and `heads`, and PPO on the heads: the states are those that the reward head reads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_ppo.cli import features as features_command
from hydra_ppo.cli.main import main
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rewards.features import open_features
from hydra_ppo.rewards.stored_heads import read_heads
from tests.faults.project import assert_same
from tests.faults.test_stop_and_resume import stop_at
from tests.hydra_ppo.cli.reward_project import make_features, make_project, ppo_settings, write
from tests.hydra_ppo.cli.test_score_generate import call, encoded, read_rows, write_rows

FP16 = 2**-10
"""Relative rounding of a state."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    for name in ("pairs", "open"):
        command = ["features", str(folder / "sft"), str(folder / f"{name}.jsonl"), "--output", str(folder / f"of_{name}")]
        assert main([*command, "--mean"]) == 0
    small = ["--hidden", "16", "8", "--seed", "3"]
    assert main(["heads", str(folder / "of_pairs"), "--output", str(folder / "mlp"), "--members", "3", *small]) == 0
    assert main(["heads", str(folder / "of_pairs"), "--output", str(folder / "linear"), "--kind", "linear"]) == 0
    assert main(["heads", str(folder / "of_pairs"), "--output", str(folder / "once"), "--kind", "one-pass"]) == 0
    return folder


def states_of(run, rows: list[list[int]]) -> torch.Tensor:
    """Final states at the last token of each row, one row at a time, with nothing of the commands."""
    model = HydraModel.from_pretrained(run)
    with torch.no_grad(), model.role("reward"):
        return torch.stack([model.hidden_states(torch.tensor([row]))[0, -1] for row in rows])


class TestFeatures:
    def test_states_times_the_reward_head_are_the_scores(self, project, tmp_path, capsys):
        assert call(capsys, "score", project / "sft", project / "pairs.jsonl", "--output", tmp_path / "s.jsonl")[0] == 0
        features = open_features(project / "of_pairs")
        weight = load_file(project / "sft" / "heads.safetensors")["reward.weight"][0]
        lines = read_rows(tmp_path / "s.jsonl")
        for column, name in enumerate(("chosen_score", "rejected_score")):
            states = torch.from_numpy(np.asarray(features.states[:, column], dtype=np.float32))
            rounding = FP16 * (states.abs() @ weight.abs())
            found, expected = states @ weight, torch.tensor([line[name] for line in lines])
            assert ((found - expected).abs() <= rounding + 1e-5).all()
            assert expected.std() > 10 * rounding.max()  # so that the bound says something

    def test_states_and_means_are_those_of_the_reward_role(self, project):
        features, rows = open_features(project / "of_pairs"), read_rows(project / "pairs.jsonl")
        ids = [encoded(*row["prompt"], *row["rejected"]) for row in rows[:8]]
        expected = states_of(project / "sft", ids)
        assert torch.allclose(torch.tensor(features.states[:8, 1]).float(), expected, rtol=FP16, atol=1e-3)
        model = HydraModel.from_pretrained(project / "sft")
        for row, sequence, found in zip(rows, ids, features.means[:8, 1], strict=False):
            start = len(encoded(*row["prompt"]))
            with torch.no_grad(), model.role("reward"):
                mean = model.hidden_states(torch.tensor([sequence]))[0, start:].mean(dim=0)
            assert torch.allclose(torch.tensor(found).float(), mean, rtol=2 * FP16, atol=2e-3)
        lengths = [len(encoded(*rows[0]["prompt"], *rows[0][name])) - start_of(rows[0]) for name in ("chosen", "rejected")]
        assert features.pairs[0].tolist() == [0, *lengths, 1]

    def test_what_they_say_of_themselves(self, project):
        about = json.loads((project / "of_pairs" / "features.json").read_text())
        assert (about["pairs"], about["adapter"], about["end"], about["means"]) == (96, "sft", "<over>", True)
        assert about["origin"]["hidden_size"] == 64
        assert about["origin"]["end"] == 32
        assert None not in (about["origin"]["base"], about["origin"]["adapter"])
        assert open_features(project / "of_pairs").rows() == read_rows(project / "pairs.jsonl")
        assert not (project / "of_pairs" / "progress.json").exists()

    def test_two_responses_are_a_pair_without_a_label(self, project, capsys):
        features = open_features(project / "of_open")
        assert features.labelled() == []
        first = read_rows(project / "open.jsonl")[0]
        assert features.rows()[0]["chosen"] == first["responses"][0]
        code, _, err = call(capsys, "heads", project / "of_open", "--output", project / "none")
        assert (code, "has no pair with a label" in err) == (2, True)

    def test_stopped_anywhere_it_looks_unfinished_and_goes_on(self, project, tmp_path, capsys, monkeypatch):
        command = ["features", project / "sft", project / "pairs.jsonl", "--output", tmp_path / "f", "--batch-size", "3"]
        assert call(capsys, *command[:-4], "--output", tmp_path / "whole", "--batch-size", "3")[0] == 0
        states, seen = features_command.pair_states, []

        def dies(opened, part, *others):
            seen.append(len(part))
            if len(seen) == 3:
                raise KeyboardInterrupt
            return states(opened, part, *others)

        with monkeypatch.context() as patch:
            patch.setattr(features_command, "pair_states", dies)
            assert call(capsys, *command)[0] == 130
        code, _, err = call(capsys, "heads", tmp_path / "f", "--output", tmp_path / "h")
        assert (code, "is not whole; run the same hydra-ppo features again" in err) == (2, True)
        code, _, err = call(capsys, *command, "--data.max_response_tokens", "2")
        assert (code, "was begun with another model, other data or other settings" in err) == (2, True)
        code, out, _ = call(capsys, *command)
        assert code == 0
        assert "has 24 of 96 pairs already" in out
        for name in ("states.npy", "pairs.npy", "rows.jsonl"):
            assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_bad_input_is_one_line(self, project, tmp_path, capsys):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("")
        for argv, message in (
            ([project / "base", project / "pairs.jsonl", "--output", tmp_path / "x"], "holds no hydra.json"),
            ([project / "sft", project / "pairs.jsonl"], "required: --output"),
            ([project / "sft", project / "pairs.jsonl", "--output", project / "of_pairs"], "holds features already"),
            ([project / "sft", project / "pairs.jsonl", "--output", tmp_path / "full"], "holds 'mine' already"),
            ([project / "sft", tmp_path / "no.jsonl", "--output", tmp_path / "x"], "no such file"),
        ):
            code, out, err = call(capsys, "features", *argv)
            assert (code, out, err.count("\n"), message in err) == (2, "", 1, True), err
        assert not (tmp_path / "x").exists()


def start_of(row: dict) -> int:
    return len(encoded(*row["prompt"]))


class TestHeads:
    def test_they_learn_what_the_pairs_say(self, tmp_path, capsys):
        folder = make_features(tmp_path / "f", 1500, noise=0.3)
        for kind in ("linear", "mlp", "one-pass"):
            options = ["--kind", kind, "--held-out", "0.2", *(["--hidden", "32", "--members", "3"] if kind == "mlp" else [])]
            code, out, _ = call(capsys, "heads", folder, "--output", tmp_path / kind, *options)
            assert code == 0
            heads = read_heads(tmp_path / kind)
            assert heads.measured["held_out"] == 300
            assert heads.measured["accuracy"] > 0.9, kind
            assert f"{heads.measured['accuracy']:.4f}" in out
            features = open_features(folder)
            states = torch.tensor(np.asarray(features.states[:400, 0], dtype=np.float32))
            worth = states @ torch.linspace(-1.5, 1.5, 12)
            found = heads.members(states).mean(dim=1)
            assert torch.corrcoef(torch.stack([worth, found]))[0, 1] > 0.9, kind
            if kind != "one-pass":
                both = torch.tensor(np.asarray(features.states, dtype=np.float32)).flatten(0, 1)
                assert heads.members(both).mean(dim=0).abs().max() < 0.2  # zero is the mean of what was seen

    def test_members_differ_and_a_seed_is_a_seed(self, tmp_path, capsys):
        folder = make_features(tmp_path / "f", 200)
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert call(capsys, "heads", folder, "--output", tmp_path / name, "--kind", "linear", "--seed", seed)[0] == 0
        first, again, other = (load_file(tmp_path / name / "heads.safetensors") for name in "abc")
        assert all(torch.equal(first[name], again[name]) for name in first)
        weight = first["layers.0.weight"]
        assert weight.shape == (5, 1, 12)
        assert len({row.tobytes() for row in weight.numpy()}) == 5
        assert not torch.equal(weight, other["layers.0.weight"])

    def test_prompts_stay_together(self, tmp_path, capsys):
        """Four pairs of each prompt: held out are whole prompts."""
        folder = make_features(tmp_path / "f", 40, per_prompt=4)
        assert call(capsys, "heads", folder, "--output", tmp_path / "h", "--kind", "linear", "--held-out", "0.2")[0] == 0
        measured = read_heads(tmp_path / "h").measured
        assert (measured["pairs"], measured["held_out"]) == (32, 8)

    def test_bad_input_is_one_line(self, project, tmp_path, capsys):
        one = make_features(tmp_path / "one", 4, per_prompt=4)
        for argv, message in (
            ([tmp_path / "no", "--output", tmp_path / "x"], "holds no features.json"),
            ([project / "of_pairs", "--output", project / "mlp"], "is not empty; choose another folder"),
            ([project / "of_pairs", "--output", tmp_path / "x", "--kind", "one-pass", "--members", "3"], "which is one head"),
            (
                [project / "of_pairs", "--output", tmp_path / "x", "--kind", "linear", "--hidden", "3"],
                "--hidden does not go with",
            ),
            (
                [project / "of_pairs", "--output", tmp_path / "x", "--kind", "linear", "--learning-rate=1"],
                "--learning-rate does not go with --kind linear",
            ),
            ([project / "of_pairs", "--output", tmp_path / "x", "--held-out", "1"], "'1' is not a number between 0 and 1"),
            ([one, "--output", tmp_path / "x"], "of 1 prompt leaves none to train on"),
        ):
            code, _, err = call(capsys, "heads", *argv)
            assert (code, err.count("\n"), message in err) == (2, 1, True), err


class TestServed:
    def sources(self, project) -> list[dict]:
        mlp, once = str(project / "mlp"), str(project / "once")
        return [
            {"kind": "head", "target": mlp, "name": "mean", "weight": 0.5},
            {"kind": "head", "target": mlp, "name": "careful", "aggregate": "lcb", "aggregate_coef": 0.7},
            {"kind": "head", "target": once, "name": "shy", "aggregate": "pessimism", "aggregate_coef": 2.0},
            {"kind": "head", "name": "own", "weight": 0.25},
        ]

    def test_ppo_scores_what_the_heads_say_of_the_same_states(self, project, tmp_path, capsys):
        settings = ppo_settings(project, tmp_path / "ppo", self.sources(project))
        assert call(capsys, "ppo", write(tmp_path / "ppo.yaml", settings))[0] == 0
        lines = [line for line in read_rows(tmp_path / "ppo" / "samples.jsonl") if line["step"] == 1]
        assert len(lines) >= 4
        ids = [line["prompt"].split() + line["response"].split() for line in lines]
        # Answers that ended are written without their end; those of 6 tokens were cut.
        vocabulary = make_vocabulary()
        rows = [[vocabulary[word] for word in words] for words in ids]
        rows = [row + ([32] if len(line["response"].split()) < 6 else []) for row, line in zip(rows, lines, strict=True)]
        states = states_of(project / "sft", rows)
        mlp, once = read_heads(project / "mlp"), read_heads(project / "once")
        members = mlp.members(states)
        own = states @ load_file(project / "sft" / "heads.safetensors")["reward.weight"][0]
        for i, line in enumerate(lines):
            rewards = line["rewards"]
            assert rewards["mean"] == pytest.approx(members[i].mean().item(), abs=1e-4)
            assert rewards["mean/spread"] == pytest.approx(members[i].std().item(), abs=1e-4)
            assert rewards["careful"] == pytest.approx((members[i].mean() - 0.7 * members[i].std()).item(), abs=1e-4)
            assert rewards["own"] == pytest.approx(own[i].item(), abs=1e-4)
            plain = once.members(states)[i, 0].item()
            assert rewards["shy"] == pytest.approx(plain - 2.0 * rewards["shy/spread"], abs=1e-4)
            named = 0.5 * rewards["mean"] + rewards["careful"] + rewards["shy"] + 0.25 * rewards["own"]
            assert line["score"] == pytest.approx(named, abs=1e-6)  # spreads are no part of it
        # Two answers to each prompt: their features lie on both sides of their mean, as far from it.
        shy = [line["rewards"]["shy/spread"] for line in lines]
        assert lines[0]["prompt"] == lines[1]["prompt"]
        assert shy[0] == pytest.approx(shy[1], rel=1e-3)
        gap = once.scaled(states)[0] - once.scaled(states)[1]
        assert shy[0] == pytest.approx(((gap / 2) @ once.inverse @ (gap / 2)).sqrt().item(), rel=1e-2, abs=1e-5)
        metrics = read_rows(tmp_path / "ppo" / "metrics.jsonl")
        assert "reward/careful/spread" in metrics[-1]
        assert metrics[-1]["reward/mean/spread"] > 0

    def test_it_resumes_exactly_and_keeps_no_states(self, project, tmp_path, capsys, monkeypatch):
        sources = self.sources(project)
        settings = ppo_settings(project, tmp_path / "whole", sources)
        assert call(capsys, "ppo", write(tmp_path / "whole.yaml", settings))[0] == 0
        command = ["ppo", write(tmp_path / "run.yaml", ppo_settings(project, tmp_path / "run", sources)), "--resume"]
        kept = set()
        for number in (14, 17, 19):
            with monkeypatch.context() as patch:
                seen = stop_at(patch, number)
                assert call(capsys, *command)[0] == 0
            assert seen["count"] >= number
            for file in (tmp_path / "run" / "checkpoints").glob("*/*.safetensors"):
                kept |= {name for name in load_file(file) if name.startswith("experience.")}
        assert "experience.scores" in kept
        assert "experience.features" not in kept
        assert call(capsys, *command)[0] == 0
        assert_same(tmp_path / "run", tmp_path / "whole")

    def test_heads_that_changed_are_not_gone_on_with(self, project, tmp_path, capsys):
        shutil.copytree(project / "mlp", tmp_path / "mlp")
        sources = [{"kind": "head", "target": str(tmp_path / "mlp")}]
        path = write(tmp_path / "run.yaml", ppo_settings(project, tmp_path / "run", sources, steps=1))
        assert call(capsys, "ppo", path)[0] == 0
        tensors = load_file(tmp_path / "mlp" / "heads.safetensors")
        save_file(tensors | {"offset": tensors["offset"] + 1}, tmp_path / "mlp" / "heads.safetensors")
        code, _, err = call(capsys, "ppo", path, "--resume", "--steps", "2")
        assert (code, "reward.sources[0] heads.safetensors changed" in err) == (2, True)

    def test_states_of_another_model_are_refused_before_a_weight_is_read(self, project, tmp_path, capsys):
        other = HydraModel.from_pretrained(project / "sft")
        with torch.no_grad():
            next(p for n, p in other.named_parameters() if "lora" in n and "sft" in n).add_(1e-3)
        other.save_pretrained(tmp_path / "trained")
        shutil.copytree(project / "mlp", tmp_path / "mlp")
        about = json.loads((tmp_path / "mlp" / "heads.json").read_text())
        for changed, model, message in (
            ({}, tmp_path / "trained", "trained on states of another reward adapter"),
            ({"base": "0" * 32}, project / "sft", "trained on states of another base"),
            ({"end": 2}, project / "sft", "reads states at token 2, in which answers ended then; they end in 32 here"),
        ):
            changed = about | {"origin": about["origin"] | changed}
            (tmp_path / "mlp" / "heads.json").write_text(json.dumps(changed))
            settings = ppo_settings(project, tmp_path / "run", [{"kind": "head", "target": str(tmp_path / "mlp")}])
            settings["model"]["name_or_path"] = str(model)
            for tokens in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                if (project / "sft" / tokens).is_file():
                    shutil.copy(project / "sft" / tokens, tmp_path / "trained" / tokens)
            options = [] if "end" in changed["origin"] and changed["origin"]["end"] == 2 else ["--dry-run"]
            code, _, err = call(capsys, "ppo", write(tmp_path / "run.yaml", settings), *options)
            assert (code, message in err) == (2, True), err

    def test_saved_again_the_adapter_is_the_same(self, project, tmp_path, capsys):
        """PPO goes on from a checkpoint or a copy of a run: the adapter's file is another, its numbers are not."""
        HydraModel.from_pretrained(project / "sft").save_pretrained(tmp_path / "again")
        for path in (project / "sft").iterdir():
            if path.is_file() and not (tmp_path / "again" / path.name).exists():
                shutil.copy(path, tmp_path / "again" / path.name)
        settings = ppo_settings(project, tmp_path / "run", self.sources(project), steps=1)
        settings["model"]["name_or_path"] = str(tmp_path / "again")
        assert call(capsys, "ppo", write(tmp_path / "run.yaml", settings))[0] == 0

    def test_what_makes_no_sense_is_refused(self, project, tmp_path, capsys):
        single = tmp_path / "single"
        assert call(capsys, "heads", project / "of_pairs", "--output", single, "--kind", "linear", "--members", "1")[0] == 0
        mlp, once = str(project / "mlp"), str(project / "once")
        damaged = tmp_path / "damaged"
        shutil.copytree(project / "mlp", damaged)
        tensors = load_file(damaged / "heads.safetensors")
        save_file({name: t for name, t in tensors.items() if name != "layers.1.bias"}, damaged / "heads.safetensors")
        for source, message in (
            ({"target": mlp, "aggregate": "pessimism"}, "needs a one-pass head"),
            ({"target": str(single), "aggregate": "variance"}, "needs two members or more"),
            ({"target": once, "aggregate": "lcb"}, "needs two members or more"),
            ({"target": mlp, "aggregate": "median"}, "aggregate='median' is not one of"),
            ({"target": mlp, "aggregate_coef": 0.5}, "has nothing to do with aggregate='mean'"),
            ({"target": mlp, "aggregate": "lcb", "aggregate_coef": -1.0}, "must not be negative"),
            ({"aggregate": "lcb"}, "needs a model with several reward heads, this one has 1"),
            ({"aggregate": "pessimism"}, "needs one-pass heads"),
            ({"kind": "function", "target": "a:b", "aggregate": "lcb"}, "does not go with kind='function'"),
            ({"target": once, "aggregate": "pessimism"}, "samples_per_prompt=1 leaves none"),
            ({"target": str(tmp_path / "no")}, "holds no heads.json"),
            ({"target": str(damaged)}, "holds no tensors of 3 heads of kind 'mlp'"),
        ):
            settings = ppo_settings(project, tmp_path / "run", [{"kind": "head"} | source])
            if "samples_per_prompt=1" in message:
                settings["rollout"]["samples_per_prompt"] = 1
            code, _, err = call(capsys, "ppo", write(tmp_path / "run.yaml", settings), "--dry-run")
            assert (code, err.count("\n"), message in err) == (2, 1, True), err
        assert not (tmp_path / "run").exists()

    def test_they_can_judge_held_out_answers_alone(self, project, tmp_path, capsys):
        """eval_rewards reads the states too, where no source of the score does."""
        judges = [{"kind": "head", "target": str(project / "linear"), "name": "other"}]
        settings = ppo_settings(project, tmp_path / "run", [{"kind": "head"}], steps=1, eval_rewards=judges)
        assert call(capsys, "ppo", write(tmp_path / "run.yaml", settings))[0] == 0
        metrics = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
        assert [name for name in metrics if "other" in name]
        assert metrics["eval/scores"] == pytest.approx(metrics["eval/reward/head"])

    def test_a_dry_run_says_what_it_found(self, project, tmp_path, capsys):
        settings = ppo_settings(project, tmp_path / "run", self.sources(project))
        code, out, _ = call(capsys, "ppo", write(tmp_path / "run.yaml", settings), "--dry-run")
        assert code == 0
        assert "heads found, of this model's states" in " ".join(out.split())

    def test_the_run_can_be_moved_with_its_heads(self, project, tmp_path, capsys):
        """Its config names them from where it lies."""
        settings = ppo_settings(project, tmp_path / "run", [{"kind": "head", "target": str(project / "linear")}], steps=1)
        assert call(capsys, "ppo", write(tmp_path / "run.yaml", settings))[0] == 0
        text = (tmp_path / "run" / "config.yaml").read_text()
        assert str(project) not in text.replace(str(tmp_path), "")
        assert "linear" in text


def make_vocabulary() -> dict[str, int]:
    from tests.hydra_ppo.cli.test_score_generate import chat_tokenizer

    return chat_tokenizer().get_vocab()


def test_rows_of_their_own_names(project, tmp_path, capsys):
    """data.columns names answers that are not called chosen and rejected."""
    rows = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in read_rows(project / "pairs.jsonl")[:6]]
    source = write_rows(tmp_path / "named.jsonl", rows)
    columns = ["--data.columns", "{prompt: q, chosen: good, rejected: bad}"]
    assert call(capsys, "features", project / "sft", source, "--output", tmp_path / "f", *columns)[0] == 0
    features = open_features(tmp_path / "f")
    assert np.allclose(features.states, open_features(project / "of_pairs").states[:6], atol=2e-3)
    assert features.rows()[0]["chosen"] == rows[0]["good"]
