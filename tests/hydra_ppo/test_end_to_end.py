"""The commands on a tiny model: sft, ppo, inspect, export, quickstart."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydra_ppo.cli.main import main
from tests.training import WORDS, write_model


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a base and data, as a user would have it."""
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    rng = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(48):
            prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))
            row = {
                "prompt": prompt,
                "chosen": " ".join(rng.choices(WORDS[:8], k=4)),
                "rejected": " ".join(rng.choices(WORDS[8:], k=4)),
            }
            file.write(json.dumps(row) + "\n")
    return folder


def sft_settings(folder, **changes):
    return {
        "model": {"name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.2},
        "run": {"output": str(folder / "sft"), "progress": False},
        "epochs": 3,
        "batch_size": 8,
        "eval_every": 5,
        "optimizer": {"learning_rate": 3e-3},
        **changes,
    }


def ppo_settings(folder, **changes):
    return {
        "model": {"name_or_path": str(folder / "sft")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.2},
        "run": {"output": str(folder / "ppo"), "progress": False, "save_every": 1, "keep_last": 2, "trackers": ["tensorboard"]},
        "rollout": {"batch_size": 8, "max_new_tokens": 6},
        "steps": 3,
        "minibatch_size": 4,
        **changes,
    }


def write(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full", "nf4"])
def test_sft_then_ppo_then_inspect_then_export(project, method, tmp_path, capsys):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    sft, ppo = sft_settings(tmp_path), ppo_settings(tmp_path)
    if method == "full":
        sft["method"] = "full"
    if method == "nf4":
        sft["model"]["quantization"] = ppo["model"]["quantization"] = "nf4"
    assert main(["sft", write(tmp_path / "sft.yaml", sft), "--dry-run"]) == 0
    assert not (tmp_path / "sft").exists()
    assert main(["sft", write(tmp_path / "sft.yaml", sft)]) == 0
    assert json.loads((tmp_path / "sft" / "summary.json").read_text())["eval/reward_accuracy"] > 0.7
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo), "--kl.coef", "0.1"]) == 0
    assert f"Page: {tmp_path / 'ppo' / 'report.html'}" in capsys.readouterr().out

    run = tmp_path / "ppo"
    assert "step 3 of 3" in (run / "report.html").read_text()
    assert [m["step"] for m in metrics(run)] == [0, 1, 2, 3]
    assert {m["kl_coef"] for m in metrics(run)[1:]} == {0.1}
    assert metrics(run)[1]["objective/kl"] == pytest.approx(0, abs=1e-3)
    for name in ("config.yaml", "samples.jsonl", "actor", "critic", "heads.safetensors", "hydra.json", "tensorboard"):
        assert (run / name).exists(), name
    assert {p.name for p in (run / "plots").iterdir()} >= {"reward.png", "kl.png", "length.png", "memory.png"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    capsys.readouterr()

    assert main(["inspect", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["state"] == "finished"
    assert main(["ppo", str(tmp_path / "ppo.yaml")]) == 2
    assert "holds a finished run; choose another folder, go on with --resume" in capsys.readouterr().err

    assert main(["export", str(run), "--output", str(tmp_path / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("w1 w2", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.shape == (1, 2, 32)


def test_ppo_goes_on_from_a_ppo_run_and_from_a_checkpoint(project, tmp_path):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    assert main(["sft", write(tmp_path / "sft.yaml", sft_settings(tmp_path))]) == 0
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo_settings(tmp_path))]) == 0
    from hydra_ppo.model.hydra import HydraModel

    done = HydraModel.from_pretrained(tmp_path / "ppo")
    last = HydraModel.from_pretrained(tmp_path / "ppo" / "checkpoints" / "step-000003")
    for name, parameter in done.named_parameters():
        assert torch.equal(parameter, dict(last.named_parameters())[name]), name


def test_a_separately_trained_reward_adapter(project, tmp_path):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    assert main(["sft", write(tmp_path / "a.yaml", sft_settings(tmp_path, reward_coef=0.0))]) == 0
    reward = sft_settings(tmp_path, sft_coef=0.0, adapter="reward")
    reward["model"]["name_or_path"] = str(tmp_path / "sft")
    reward["run"]["output"] = str(tmp_path / "reward")
    assert main(["sft", write(tmp_path / "b.yaml", reward)]) == 0
    ppo = ppo_settings(tmp_path)
    ppo["model"]["name_or_path"] = str(tmp_path / "reward")
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo)]) == 0
    roles = json.loads((tmp_path / "ppo" / "hydra.json").read_text())["roles"]
    assert (roles["reference"]["adapter"], roles["reward"]["adapter"]) == ("sft", "reward")


@pytest.mark.parametrize("policy", ["base", "sft"])
def test_reward_training_alone_leaves_the_policy_as_it_was(policy, project, tmp_path, capsys):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    if policy == "sft":
        assert main(["sft", write(tmp_path / "a.yaml", sft_settings(tmp_path, reward_coef=0.0))]) == 0
    reward = sft_settings(tmp_path, sft_coef=0.0, reward_coef=1.0)  # `adapter` is left at its default
    reward["model"]["name_or_path"] = str(tmp_path / policy)
    reward["run"]["output"] = str(tmp_path / "reward")
    capsys.readouterr()
    assert main(["sft", write(tmp_path / "b.yaml", reward)]) == 0
    assert "gets an adapter of its own, 'reward'" in capsys.readouterr().err
    from hydra_ppo.model.hydra import HydraModel

    before, after = HydraModel.from_pretrained(tmp_path / policy), HydraModel.from_pretrained(tmp_path / "reward")
    reference = after.roles["reference"].adapter
    assert (reference, after.roles["reward"].adapter) == (None if policy == "base" else "sft", "reward")
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    with torch.no_grad(), before.role("reference"), after.role("actor"):
        torch.testing.assert_close(after.causal_lm(ids).logits, before.causal_lm(ids).logits, rtol=0, atol=0)
    assert after.heads["reward"].weight.abs().max() > 0


def test_sft_alone_leaves_no_reward_head_to_ppo(project, tmp_path, capsys):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    assert main(["sft", write(tmp_path / "sft.yaml", sft_settings(tmp_path, reward_coef=0.0))]) == 0
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo_settings(tmp_path))]) == 2
    assert "this model's was never trained" in capsys.readouterr().err
    assert not (tmp_path / "ppo").exists()
    reward = {"sources": [{"kind": "function", "target": "tests.training:count_low_tokens"}], "isolation": "thread"}
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo_settings(tmp_path, reward=reward))]) == 0


def test_a_failing_reward_function_ends_with_1_and_leaves_the_checkpoint(project, tmp_path, capsys):
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(project / name)
    assert main(["sft", write(tmp_path / "sft.yaml", sft_settings(tmp_path))]) == 0
    reward = {
        "sources": [{"kind": "function", "target": "tests.hydra_ppo.test_end_to_end:fails_the_third_time"}],
        "isolation": "thread",
    }
    calls.clear()
    assert main(["ppo", write(tmp_path / "ppo.yaml", ppo_settings(tmp_path, reward=reward))]) == 1
    assert "step=2 phase=score: function" in capsys.readouterr().err
    assert json.loads((tmp_path / "ppo" / "state.json").read_text())["state"] == "failed"
    from hydra_ppo.model.hydra import HydraModel

    assert HydraModel.from_pretrained(tmp_path / "ppo" / "checkpoints" / "step-000001").reward_head_trained


calls: list[int] = []


def fails_the_third_time(prompts, responses):
    """The first call evaluates the held-out prompts, the second scores step 1."""
    calls.append(1)
    if len(calls) == 3:
        raise OSError("the judge is down")
    return [0.0] * len(responses)


def test_quickstart_in_small(tmp_path, monkeypatch, capsys):
    from hydra_ppo.quickstart import run

    small = run.make_corpus

    def few(seed):
        return small(seed, pairs=48, eval_pairs=16, prompts=24, eval_prompts=8)

    ppo = run.ppo_config
    monkeypatch.setattr(run, "make_corpus", few)
    monkeypatch.setattr(
        run,
        "ppo_config",
        lambda folder, seed: replace(
            ppo(folder, seed), steps=2, minibatch_size=8, rollout=replace(ppo(folder, seed).rollout, batch_size=8)
        ),
    )
    output = tmp_path / "quickstart"
    assert main(["quickstart", "--output", str(output), "--seed", "3"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    keys = {"gold_before", "gold_after", "win_rate", "kl", "reward_accuracy", "seconds", "peak_bytes", "responses_per_second"}
    assert keys <= summary.keys()
    assert summary["peak_bytes"] > summary["memory"]["base_bytes"] > 0
    shown = capsys.readouterr().out
    assert "win rate against the SFT policy" in shown
    assert "four separate models" in shown
    assert main(["quickstart", "--output", str(output)]) == 2
    (output / "mine.txt").write_text("keep")
    assert main(["quickstart", "--output", str(output), "--overwrite"]) == 2
    assert (output / "mine.txt").exists()
