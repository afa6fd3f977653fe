"""What the commands make of a run whose reward model has several heads, or an expected reward."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hydra_ppo.cli.export import export_role
from hydra_ppo.cli.main import main
from hydra_ppo.experience import Experience
from hydra_ppo.model.heads import HeadPlan
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.scoring import reward_scores
from tests.families import randomise
from tests.hydra_ppo.cli.test_export import EOS, assert_same_scores, classified, in_words, rows, words
from tests.training import llama

CPU = torch.device("cpu")


def write_run(folder, plan: HeadPlan) -> HydraModel:
    """Write a base, an sft run with such heads and a ppo run on that; return the last."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(num_key_value_heads=2)).save_pretrained(folder / "base")
    model = None
    for name, source, stage, heads in (("sft", "base", "sft", plan), ("ppo", "sft", "ppo", None)):
        model = HydraModel.from_pretrained(folder / source, train=stage, heads=heads)
        randomise(model, seed=len(name))
        model.reward_head_trained = True
        model.trained_end = EOS
        model.save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    assert model is not None
    return model


def r_alone(model: HydraModel, prompts, responses) -> list[float]:
    """Return r(x, y), the expected reward left in."""
    sequences = Experience.from_lists(prompts, responses, 0, CPU).sequences()
    with torch.no_grad(), model.role("reward"):
        return model.readings(sequences).members.mean(dim=1).tolist()


@pytest.mark.parametrize("adapter_only", [False, True], ids=["merged", "adapter"])
@pytest.mark.parametrize("plan", [HeadPlan(3), HeadPlan(2, expected=True)], ids=str)
def test_a_classifier_is_the_mean_of_the_heads(plan, adapter_only, tmp_path):
    model = write_run(tmp_path, plan)
    prompts, responses = rows(16)
    notes = export_role(tmp_path / "ppo", tmp_path / "out", role="reward", adapter_only=adapter_only)
    assert any(f"written is the mean of {plan.reward} reward heads" in note for note in notes)
    assert any("without the expected reward of the prompt" in note for note in notes) == plan.expected
    if adapter_only:
        options = {"num_labels": 1, "pad_token_id": 0}
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
        plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    found = classified(plain, tokens, in_words(words(), prompts, responses))
    assert_same_scores(found, r_alone(model, prompts, responses))
    ours = reward_scores(model, prompts, responses, [EOS], pad_id=0)
    same = max(abs(a - b) for a, b in zip(found[0], ours, strict=True)) < 1e-4
    assert same != plan.expected


def test_a_critic_leaves_as_one_head(tmp_path):
    write_run(tmp_path, HeadPlan(3))
    notes = export_role(tmp_path / "ppo", tmp_path / "out", role="critic")
    assert not any("mean of" in note for note in notes)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_between_answers_to_one_prompt_the_classifier_says_what_we_say(tmp_path):
    model = write_run(tmp_path, HeadPlan(1, expected=True))
    _, responses = rows(8)
    prompts = [[5, 6, 7]] * 8
    ours = reward_scores(model, prompts, responses, [EOS], pad_id=0)
    theirs = r_alone(model, prompts, responses)
    shift = theirs[0] - ours[0]
    assert abs(shift) > 1e-3
    assert [a - b for a, b in zip(theirs, ours, strict=True)] == pytest.approx([shift] * 8, abs=1e-5)


def test_scores_of_the_command_are_above_the_expected_reward(tmp_path, capsys):
    model = write_run(tmp_path, HeadPlan(2, expected=True))
    (tmp_path / "given.jsonl").write_text(json.dumps({"prompt": "w1 w2", "response": " w3 w4"}) + "\n")
    out = tmp_path / "scores.jsonl"
    assert main(["score", str(tmp_path / "ppo"), str(tmp_path / "given.jsonl"), "--output", str(out)]) == 0
    found = json.loads(out.read_text())["score"]
    assert found == pytest.approx(reward_scores(model, [[5, 6]], [[7, 8, EOS]], [EOS], pad_id=0)[0], abs=1e-5)


def test_a_dry_run_says_how_many_heads_there_are(tmp_path, capsys):
    write_run(tmp_path, HeadPlan(3))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n' * 4)
    argv = ["ppo", "--model.name_or_path", str(tmp_path / "sft"), "--data.train", str(tmp_path / "prompts.jsonl")]
    argv += ["--run.output", str(tmp_path / "out"), "--reward.sources", "[{kind: head, aggregate: lcb}]", "--dry-run"]
    assert main(argv) == 0
    assert "with 3 reward heads" in " ".join(capsys.readouterr().out.replace("│", " ").split())
