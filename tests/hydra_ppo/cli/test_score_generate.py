"""`hydra-ppo score` and `hydra-ppo generate` on a run whose answers end in another token than the tokenizer's eos."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hydra_ppo.cli.generate import Sampling
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.model.hydra import HydraModel
from tests.training import WORDS, llama

SCORE_TOLERANCE = 1e-4
OVER = 32
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['role'] == 'assistant' %}<over> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """<pad> 0, <bos> 1, <eos> 2, <unk> 3, words 4 to 31, and <over> 32, in which the template ends an answer."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS, "<over>", "user", "assistant"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<over>"]})
    made.chat_template = TEMPLATE
    return made


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(rng: random.Random) -> dict:
    return {
        "prompt": said("user", " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))),
        "chosen": said("assistant", " ".join(rng.choices(WORDS[:8], k=rng.randint(2, 5)))),
        "rejected": said("assistant", " ".join(rng.choices(WORDS[8:], k=rng.randint(2, 5)))),
    }


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """base, sft and ppo runs, pairs.jsonl and held_out.jsonl."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(vocab_size=40)).save_pretrained(folder / "base")
    chat_tokenizer().save_pretrained(folder / "base")
    rng = random.Random(0)
    write_rows(folder / "pairs.jsonl", [pair(rng) for _ in range(64)])
    write_rows(folder / "held_out.jsonl", [pair(rng) for _ in range(24)])
    sft = {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "held_out.jsonl"), "max_response_tokens": 8},
        "run": {"output": str(folder / "sft"), "progress": False},
        "epochs": 2,
        "batch_size": 8,
        "reward_coef": 1.0,
        "optimizer": {"learning_rate": 3e-3},
    }
    ppo = {
        "model": {"name_or_path": str(folder / "sft")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "run": {"output": str(folder / "ppo"), "progress": False},
        "rollout": {"batch_size": 8, "max_new_tokens": 6},
        "optimizer": {"learning_rate": 3e-2},
        "steps": 2,
        "minibatch_size": 4,
    }
    for command, settings in (("sft", sft), ("ppo", ppo)):
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(settings))
        assert main([command, str(folder / f"{command}.yaml")]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def encoded(*turns: dict[str, str]) -> list[int]:
    text = chat_tokenizer().apply_chat_template(list(turns), tokenize=False, add_generation_prompt=turns[-1]["role"] == "user")
    return chat_tokenizer()(text, add_special_tokens=False)["input_ids"]


def head_says(run: Path, rows: list[list[int]]) -> list[float]:
    """What the reward head says at the last token of each row, one row at a time, with nothing of the commands."""
    model = HydraModel.from_pretrained(run)
    with torch.no_grad(), model.role("reward"):
        return [model.heads["reward"](model.hidden_states(torch.tensor([row]))[0, -1]).item() for row in rows]


class TestScore:
    def test_pairs_as_training_saw_them(self, project, tmp_path, capsys):
        output = tmp_path / "scores.jsonl"
        code, out, _ = call(capsys, "score", project / "sft", project / "held_out.jsonl", "--output", output)
        assert code == 0
        trained = json.loads((project / "sft" / "summary.json").read_text())["eval/reward_accuracy"]
        lines = read_rows(output)
        accuracy = sum(line["chosen_score"] > line["rejected_score"] for line in lines) / len(lines)
        assert accuracy == pytest.approx(trained, abs=1e-9)
        assert accuracy > 0.7
        mean = sum(line["margin"] for line in lines) / len(lines)
        assert [f"{accuracy:.4f}", f"{mean:.4f}"] == [
            line.split()[-1] for line in out.splitlines() if line.startswith(("accuracy", "mean margin"))
        ]
        assert "24 of 24 rows are used" in out
        assert lines[0]["chosen"].strip().endswith("<over>")

    def test_reads_at_the_end_of_the_turn(self, project, tmp_path, capsys):
        """As PPO reads: at <over>, which is not the tokenizer's eos."""
        assert call(capsys, "score", project / "ppo", project / "held_out.jsonl", "--output", tmp_path / "s.jsonl")[0] == 0
        rows = read_rows(project / "held_out.jsonl")
        ids = [encoded(*row["prompt"], *row["chosen"]) for row in rows]
        assert {row[-1] for row in ids} == {OVER}
        expected = head_says(project / "ppo", ids)
        found = [line["chosen_score"] for line in read_rows(tmp_path / "s.jsonl")]
        assert found == pytest.approx(expected, abs=SCORE_TOLERANCE)

    @pytest.mark.parametrize("form", ["response", "messages", "responses", "of a question in text"])
    def test_responses(self, form, project, tmp_path, capsys):
        rows = read_rows(project / "held_out.jsonl")
        expected = head_says(project / "sft", [encoded(*row["prompt"], *row["chosen"]) for row in rows])
        given = []
        for row in rows:
            answer = row["chosen"] if form in ("messages", "of a question in text") else row["chosen"][0]["content"]
            question = row["prompt"][0]["content"] if form == "of a question in text" else row["prompt"]
            several = {"responses": [answer, row["rejected"][0]["content"]]} if form == "responses" else {"response": answer}
            given.append({"prompt": question, **several})
        source = write_rows(tmp_path / "given.jsonl", given)
        code, out, _ = call(capsys, "score", project / "sft", source, "--output", tmp_path / "s.jsonl", "--batch-size", "5")
        assert code == 0
        assert f"responses{'':15}{48 if form == 'responses' else 24:>12}" in out
        lines = read_rows(tmp_path / "s.jsonl")
        found = [line["scores"][0] if form == "responses" else line["score"] for line in lines]
        assert found == pytest.approx(expected, abs=SCORE_TOLERANCE)

    def test_settings_of_the_run_can_be_changed(self, project, capsys):
        changes = ["--data.max_response_tokens", "2", "--quantization", "nf4"]
        code, out, _ = call(capsys, "score", project / "sft", project / "held_out.jsonl", *changes)
        assert code == 0
        assert "24 of 24 rows: chosen cut to data.max_response_tokens=2" in out

    def test_rows_left_out_are_counted(self, project, tmp_path, capsys):
        rows = read_rows(project / "held_out.jsonl")[:3]
        rows[1]["rejected"] = rows[1]["chosen"]
        code, out, _ = call(capsys, "score", project / "sft", write_rows(tmp_path / "rows.jsonl", rows))
        assert code == 0
        assert "2 of 3 rows are used" in out
        assert "1 of 3 rows: chosen equals rejected" in out

    def test_of_a_checkpoint(self, project, tmp_path, capsys):
        (checkpoint,) = (project / "ppo" / "checkpoints").iterdir()
        outputs = []
        for run in (checkpoint, project / "ppo"):
            outputs.append(tmp_path / f"{run.name}.jsonl")
            assert call(capsys, "score", run, project / "held_out.jsonl", "--output", outputs[-1])[0] == 0
        assert outputs[0].read_text() == outputs[1].read_text()

    def test_bad_input_is_one_line(self, project, tmp_path, capsys):
        held_out = project / "held_out.jsonl"
        there = write_rows(tmp_path / "there.jsonl", [{"prompt": "w1", "response": ""}])
        for argv, message in (
            (["nowhere", held_out], "nowhere is not a folder; name a run folder of ppo or sft."),
            ([project / "base", held_out], "holds no hydra.json; name the folder of a finished sft or ppo run."),
            ([project / "sft", held_out, "--output", there], "is there already; choose another file, or remove it."),
            ([project / "sft", held_out, "--output", tmp_path / "no" / "s"], "there is no folder"),
            ([project / "sft", there], "none of 1 rows is usable (1 x response is empty)"),
            ([project / "sft", held_out, "--data.max_promt_tokens", "3"], "did you mean data.max_prompt_tokens?"),
            ([project / "sft", held_out, "--data.end_of_turn", "<eos>"], "but the reward head was trained at <over> (32)"),
            ([project / "sft", held_out, "--batch-size", "0"], "'0' is not a whole number of 1 or more"),
        ):
            code, out, err = call(capsys, "score", *argv)
            assert (code, out, err.count("\n")) == (2, "", 1) or "attention=auto" in err
            assert code == 2
            assert message in err

    def test_a_head_that_was_never_trained_is_refused(self, project, tmp_path, capsys):
        HydraModel.from_pretrained(project / "base", train="sft").save_pretrained(tmp_path / "run")
        code, _, err = call(capsys, "score", tmp_path / "run", project / "held_out.jsonl")
        assert (code, "reward head that was never trained" in err) == (2, True)


class TestGenerate:
    def test_base_and_actor_side_by_side(self, project, tmp_path, capsys):
        output = tmp_path / "out.jsonl"
        code, out, _ = call(
            capsys, "generate", project / "ppo", "--prompts", project / "held_out.jsonl", "--both", "--samples", "2",
            "--max-new-tokens", "9", "--output", output,
        )  # fmt: skip
        assert code == 0
        lines = read_rows(output)
        assert len(lines) == 48
        assert [line["sample"] for line in lines[:4]] == [0, 1, 0, 1]
        assert lines[0]["prompt"] == lines[1]["prompt"] != lines[2]["prompt"]
        assert any(line["base"]["response"] != line["actor"]["response"] for line in lines)
        for line in lines:
            for role in ("base", "actor"):
                assert 1 <= line[role]["tokens"] <= 9
                assert line[role]["ended"] or line[role]["tokens"] == 9
        mean = sum(line["actor"]["score"] for line in lines) / len(lines)
        assert f"actor: 48 answers, mean score {mean:+.4f}" in out
        assert "Wrote 48 lines" in out

    @pytest.mark.parametrize("role", ["actor", "base", "reference"])
    def test_greedy_is_what_plain_transformers_generates(self, role, project, tmp_path, capsys):
        output = tmp_path / "out.jsonl"
        command = ["generate", project / "ppo", "--prompts", project / "held_out.jsonl", "--role", role, "--output", output]
        assert call(capsys, *command, "--temperature", "0", "--max-new-tokens", "12")[0] == 0
        if role == "base":
            plain = AutoModelForCausalLM.from_pretrained(project / "base")
            plain.generation_config.eos_token_id = [OVER, 2]
        else:
            run = project / ("ppo" if role == "actor" else "sft")
            assert call(capsys, "export", run, "--output", tmp_path / "plain")[0] == 0
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert plain.generation_config.eos_token_id == [OVER, 2]
        tokens = AutoTokenizer.from_pretrained(project / "ppo")
        known = sorted(tokens.get_vocab().values())
        never = [[i] for i in range(40) if i not in known]
        for line, row in list(zip(read_rows(output), read_rows(project / "held_out.jsonl"), strict=True))[:6]:
            prompt = torch.tensor([encoded(*row["prompt"])])
            with torch.no_grad():
                whole = plain.generate(prompt, do_sample=False, max_new_tokens=12, bad_words_ids=never)
            ids = whole[0, prompt.shape[1] :].tolist()
            assert line[role]["tokens"] == len(ids)
            assert line[role]["ended"] == (ids[-1] in (OVER, 2))
            assert line[role]["response"].split() == tokens.decode(ids[:-1] if line[role]["ended"] else ids).split()

    def test_scores_are_what_ppo_reads(self, project, tmp_path, capsys):
        output = tmp_path / "out.jsonl"
        assert call(capsys, "generate", project / "ppo", "--prompts", project / "held_out.jsonl", "--output", output)[0] == 0
        lines = [line for line in read_rows(output) if line["actor"]["ended"]]
        assert lines
        rows = [chat_tokenizer()(f"{line['prompt']} {line['actor']['response']} <over>")["input_ids"] for line in lines]
        expected = head_says(project / "ppo", rows)
        assert [line["actor"]["score"] for line in lines] == pytest.approx(expected, abs=SCORE_TOLERANCE)

    def test_the_same_seed_draws_the_same(self, project, capsys):
        command = ["generate", project / "ppo", "--prompt", "w1 w2", "--samples", "4"]
        first, again, other = (call(capsys, *command, "--seed", seed)[1] for seed in (1, 1, 2))
        assert first == again != other
        assert "\nuser w1 w2 assistant" in first

    def test_roles_draw_with_the_same_numbers(self, project, tmp_path, capsys):
        """An actor that was not trained yet says what its reference says."""
        HydraModel.from_pretrained(project / "sft").save_pretrained(tmp_path / "run")
        answers = []
        for role in ("actor", "reference"):
            output = tmp_path / f"{role}.jsonl"
            command = ["generate", tmp_path / "run", "--prompt", "w1 w2", "--samples", "8", "--role", role, "--output", output]
            assert call(capsys, *command, "--max-new-tokens", "6")[0] == 0
            answers.append([line[role] for line in read_rows(output)])
        assert answers[0] == answers[1]
        assert len({answer["response"] for answer in answers[0]}) > 1

    def test_stops_at_the_strings_that_the_run_stopped_at(self, project, tmp_path, capsys):
        shutil.copytree(project / "ppo", tmp_path / "ppo")
        settings = yaml.safe_load((tmp_path / "ppo" / "config.yaml").read_text())
        settings["rollout"]["stop"] = ["w1"]
        (tmp_path / "ppo" / "config.yaml").write_text(yaml.safe_dump(settings))
        manifest = json.loads((tmp_path / "ppo" / "hydra.json").read_text())
        manifest["base"]["name_or_path"] = os.path.relpath(project / "base", tmp_path / "ppo")
        (tmp_path / "ppo" / "hydra.json").write_text(json.dumps(manifest))
        output = tmp_path / "out.jsonl"
        command = ["generate", tmp_path / "ppo", "--prompts", project / "held_out.jsonl", "--samples", "4", "--output", output]
        assert call(capsys, *command, "--max-new-tokens", "12")[0] == 0
        answers = [line["actor"] for line in read_rows(output)]
        stopped = [answer for answer in answers if "w1" in answer["response"]]
        assert stopped
        assert all(answer["ended"] for answer in stopped)
        assert all(answer["response"].index("w1") + 3 >= len(answer["response"]) for answer in stopped)

    def test_one_prompt_as_plain_text(self, project, capsys):
        code, out, _ = call(capsys, "generate", project / "ppo", "--prompt", "w1 w2", "--plain")
        assert (code, out.splitlines()[1]) == (0, "w1 w2")

    def test_of_an_sft_run_the_reference_stands_in(self, project, capsys):
        code, out, _ = call(capsys, "generate", project / "sft", "--prompt", "w1", "--both", "--quantization", "nf4")
        assert code == 0
        assert "has no actor yet; the reference, its SFT policy, stands in." in out
        assert "base: 1 answers" in out
        assert "reference: 1 answers" in out

    def test_without_a_trained_head_there_are_no_scores(self, project, tmp_path, capsys):
        HydraModel.from_pretrained(project / "base").save_pretrained(tmp_path / "run")
        code, out, _ = call(capsys, "generate", tmp_path / "run", "--prompt", "w1", "--max-new-tokens", "3")
        assert (code, "score" in out) == (0, False)

    def test_bad_input_is_one_line(self, project, capsys):
        for argv, message in (
            ([project / "ppo"], "one of the arguments --prompts --prompt is required"),
            ([project / "ppo", "--prompt", "w1", "--both", "--role", "base"], "--both samples base and actor, --role base"),
            ([project / "ppo", "--prompt", "w1", "--role", "critic"], "invalid choice: 'critic'"),
            ([project / "ppo", "--prompt", "w1", "--temperature", "-1"], "is not a number of 0 or more"),
            ([project / "ppo", "--prompt", " "], "prompt"),
        ):
            code, _, err = call(capsys, "generate", *argv)
            assert (code, err.count("\n")) == (2, 1)
            assert message in err


def test_a_run_with_an_int8_cache_is_sampled_from_with_one():
    """The policy that was trained drew so; a base that only fits so is asked the same way."""
    run = RolloutSettings(kv_cache="int8", importance_cap=2.0)
    assert Sampling(temperature=0, batch_size=3).over(run).kv_cache == "int8"
    assert Sampling().over(RolloutSettings()).kv_cache == "auto"
