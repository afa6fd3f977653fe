"""Plans fit, take nothing that they do not need, and say what each choice costs and why not more."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from hydra_ppo.cli.flags import load_config
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.cli import plan
from hydra_ppo.profiling.cli.ladder import AWAY, CHECKPOINTS, EVERY, IN_TURN, OFFLOADED, pruned, with_savings
from hydra_ppo.profiling.cli.main import add_sizes, parse_size, sizes_of
from hydra_ppo.profiling.cli.plan import Plan, _up_to_the_last, points, search
from hydra_ppo.profiling.cli.recipe import Recipe, ppo_settings, sft_workload
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.reporting.report import format_count
from hydra_ppo.profiling.workload import Workload
from tests.profiling.models import CONFIGS, workload


@pytest.fixture(autouse=True)
def few_choices(monkeypatch):
    """A smaller grid, so that the searches here take seconds."""
    monkeypatch.setattr(plan, "HOLDS", (None, "nf4"))
    monkeypatch.setattr(plan, "ROLLOUT_BATCHES", (4, 8))
    monkeypatch.setattr(plan, "MICROBATCHES", (1, 2, 4))
    monkeypatch.setattr(plan, "RANKS", (8, 16))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    CONFIGS["llama"].save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("beside", [{}, {"ptx": True}, {"ema": True, "reward_heads": 3}], ids=str)
def test_plans_fit_and_what_would_be_better_does_not(beside, model_file):
    budget = 7 * 2**20
    found = search(workload(model=model_file, dtype="bf16", **beside), budget, margin=0)
    assert found.plans
    assert [points(p.workload) for p in found.plans] == sorted(points(p.workload) for p in found.plans)
    for fitting in found.plans:
        assert fitting.peak_bytes <= budget
        assert fitting.margin_bytes == budget - fitting.peak_bytes
        simulated = capture(fitting.workload, simulate=True)
        for phase in set(simulated.phases):
            assert fitting.phases[phase] == pytest.approx(simulated.phases[phase].bytes, rel=0.005), phase
    assert any("does not fit" in line for line in found.plans[0].why)


def test_what_runs_beside_ppo_is_planned_and_written():
    """Options of `plan` and `init` reach the workload, and the workload the settings."""
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    sizes = sizes_of(parser.parse_args(["--ema", "--ptx", "--reward-heads", "3"]))
    planned = workload(**sizes)
    assert (planned.ema, planned.ptx, planned.reward_heads) == (True, True, 3)
    settings = ppo_settings(planned)
    assert (settings["ema_decay"], settings["ptx"]) == (0.992, {"data": "pairs.jsonl"})
    assert Recipe(Plan({}, [], {}, 0, [], planned), sft_workload(planned), 0, 1).sft_settings()["reward_heads"] == 3
    assert not {"ema_decay", "ptx"} & ppo_settings(workload()).keys()


def test_a_larger_gpu_costs_no_more_and_does_no_less(model_file):
    sizes = workload(model=model_file, dtype="bf16")
    best = [search(sizes, size * 2**20, margin=0).plans[0] for size in (6, 7, 64)]
    assert points(best[1].workload) <= points(best[2].workload)
    dearest = [max((EVERY.index(saving) for saving in each.savings), default=-1) for each in best]
    assert dearest == sorted(dearest, reverse=True)
    assert dearest[0] >= 0
    assert best[2].savings == []
    assert (best[2].workload.microbatch, best[2].workload.quantization, best[2].workload.checkpointing) == (4, None, False)


def test_a_plan_uses_nothing_that_it_does_not_need(model_file):
    sizes = workload(model=model_file, dtype="bf16")
    budget = 6 * 2**20
    best = search(sizes, budget, margin=0).plans[0]
    assert best.savings
    least = replace(best.workload, rollout_batch=4, microbatch=1, score_batch=1, rank=16)
    default = {name: getattr(Workload("any"), name) for saving in EVERY for name in saving.changes}
    for saving in best.savings:
        others = [other for other in best.savings if other is not saving]
        without = with_savings(replace(least, **default), others)
        assert max(peak.bytes for peak in capture(without, simulate=True).phases.values()) > budget, saving.name


@pytest.mark.parametrize("limit", range(6))
def test_the_last_that_fits(limit):
    values = (1, 2, 4, 8, 16)
    asked = []
    found = _up_to_the_last(values, lambda value: (asked.append(value), values.index(value) < limit)[1])
    assert found == values[:limit]
    assert asked[0] == 16  # the largest first: on a GPU with room that is all
    assert len(asked) == len(set(asked)) <= 4


@pytest.mark.parametrize(("memory", "advantage"), [(5, "gae"), (1024, "group")])
def test_the_yaml_is_what_hydra_ppo_ppo_takes(memory, advantage, model_file, tmp_path, capsys):
    """Where memory is short, and where there is plenty and no critic."""
    path = tmp_path / "ppo.yaml"
    command = ["plan", "--model", model_file, "--gpu-memory", f"{memory + 1}MiB", "--margin", "1MiB", "--prompt", "24"]
    command += ["--advantage", advantage]
    assert main([*command, "--response", "12", "--output", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["plans"][0]
    config = load_config(PPOConfig, path)
    assert config.microbatch_size == best["microbatch"]
    # As many are decoded together; where no trunk is kept of all of them, a rollout is never smaller than the default.
    rows = best["rollout_batch"]
    kept = best["trunk_layers"] > 0
    assert (config.rollout.batch_size, config.rollout.generation_batch_size) == ((rows, None) if kept else (64, rows))
    assert config.model.quantization == best["quantization"]
    assert config.model.lora.r == best["rank"]
    assert config.model.gradient_checkpointing == best["checkpointing"]
    assert config.rollout.max_new_tokens == 12
    assert config.model.quantize_embeddings == best["quantize_embeddings"]
    assert config.model.checkpoint_offload == best["checkpoint_offload"]
    assert config.model.tile_tokens == best["tile_tokens"]
    assert config.rollout.kv_cache == best["kv_cache"]
    assert config.optimizer.name == best["optimizer"]
    assert config.optimizer.offload_in_rollout == best["offload_in_rollout"]
    assert config.advantage == advantage
    assert config.update_order == best["update_order"] == ("in-turn" if advantage == "gae" else "together")
    assert ("update_order=in-turn" in [saving["setting"] for saving in best["savings"]]) == (advantage == "gae")
    assert all(saving["exactness"] and saving["speed"] for saving in best["savings"])
    assert best["peak_bytes"] == max(best["phases"].values()) <= found["usable_bytes"] == memory * 2**20
    assert main([*command, "--output", str(path)]) == 2  # never over a file
    assert "exists; name another file" in capsys.readouterr().err


def test_where_nothing_fits_it_says_by_how_much(model_file, capsys):
    command = ["plan", "--model", model_file, "--gpu-memory", "1MiB", "--margin", "1B", "--prompt", "24", "--response", "12"]
    assert main([*command, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == []
    assert found["missing_bytes"] == found["smallest"]["peak_bytes"] - found["usable_bytes"] > 0
    assert main(command) == 3
    text = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits" in text
    assert "What would have to give" in text


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("1000", 1000)]
)
def test_sizes(text, size):
    assert parse_size("gpu_memory", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8TB", "-1GiB", "0", "nan", "inf GiB", "eight"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"gpu_memory=.* is not a size; write it like 8GiB"):
        parse_size("gpu_memory", text)


def test_what_is_dear_is_left_out_first():
    def fits(savings):
        asked.append(list(savings))
        return IN_TURN in savings and (OFFLOADED in savings or AWAY in savings)

    asked: list = []
    assert pruned((IN_TURN, OFFLOADED, CHECKPOINTS), fits) == (IN_TURN, AWAY)
    assert asked[0] == [IN_TURN, OFFLOADED]


def test_the_critic_is_as_large_as_the_base(model_file, capsys):
    base = CONFIGS["llama"]
    command = ["plan", "--model", model_file, "--gpu-memory", "64MiB", "--margin", "1B", "--prompt", "24", "--response", "12"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["critic_parameters"] == sum(p.numel() for p in LlamaForCausalLM(base).parameters())
    assert main(command) == 0
    assert f"critic: {format_count(found['critic_parameters'])} parameters (the base)" in capsys.readouterr().out
    assert [format_count(count) for count in (8_030_000_000, 494_000_000, 12)] == ["8.0 B", "494 M", "12"]
