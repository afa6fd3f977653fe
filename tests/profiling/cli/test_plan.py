"""Plans fit, and say why not more."""

from __future__ import annotations

import json

import pytest

from hydra_ppo.cli.flags import load_config
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.cli import plan
from hydra_ppo.profiling.cli.main import parse_size
from hydra_ppo.profiling.cli.plan import _up_to_the_last, points, search
from hydra_ppo.profiling.measuring.capture import capture
from tests.profiling.models import CONFIGS, workload


@pytest.fixture(autouse=True)
def few_choices(monkeypatch):
    """A smaller grid, so that the searches here take seconds."""
    monkeypatch.setattr(plan, "HOLDS", (None, "nf4"))
    monkeypatch.setattr(plan, "ROLLOUT_BATCHES", (4, 8))
    monkeypatch.setattr(plan, "MICROBATCHES", (1, 2, 4))
    monkeypatch.setattr(plan, "RANKS", (8, 64))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    CONFIGS["llama"].save_pretrained(folder)
    return str(folder / "config.json")


def test_plans_fit_and_what_would_be_better_does_not(model_file):
    budget = 10 * 2**20
    found = search(workload(model=model_file, dtype="bf16"), budget, margin=0)
    assert found.plans
    assert [points(p.workload) for p in found.plans] == sorted((points(p.workload) for p in found.plans), reverse=True)
    best = found.plans[0]
    for fitting in found.plans:
        assert fitting.peak_bytes <= budget
        assert fitting.margin_bytes == budget - fitting.peak_bytes
    assert any("does not fit" in line for line in best.why)
    simulated = capture(best.workload, simulate=True)
    for phase, size in best.phases.items():
        assert size == pytest.approx(simulated.phases[phase].bytes, rel=0.005), phase


def test_a_larger_gpu_never_gives_a_worse_plan(model_file):
    sizes = workload(model=model_file, dtype="bf16")
    best = [search(sizes, size * 2**20, margin=0).plans[0].workload for size in (10, 64)]
    assert points(best[0]) < points(best[1])
    assert (best[1].microbatch, best[1].quantization, best[1].checkpointing) == (4, None, False)


@pytest.mark.parametrize("limit", range(6))
def test_the_last_that_fits(limit):
    values = (1, 2, 4, 8, 16)
    asked = []
    found = _up_to_the_last(values, lambda value: (asked.append(value), values.index(value) < limit)[1])
    assert found == values[:limit]
    assert asked[0] == 16  # the largest first: on a GPU with room that is all
    assert len(asked) == len(set(asked)) <= 4


def test_the_yaml_is_what_hydra_ppo_ppo_takes(model_file, tmp_path, capsys):
    path = tmp_path / "ppo.yaml"
    command = ["plan", "--model", model_file, "--gpu-memory", "11MiB", "--margin", "1MiB", "--prompt", "24"]
    assert main([*command, "--response", "12", "--output", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["plans"][0]
    config = load_config(PPOConfig, path)
    assert config.microbatch_size == best["microbatch"]
    assert config.rollout.batch_size == best["rollout_batch"]
    assert config.model.quantization == best["quantization"]
    assert config.model.lora.r == best["rank"]
    assert config.model.gradient_checkpointing == best["checkpointing"]
    assert config.rollout.max_new_tokens == 12
    assert best["peak_bytes"] == max(best["phases"].values()) <= found["usable_bytes"] == 10 * 2**20
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
