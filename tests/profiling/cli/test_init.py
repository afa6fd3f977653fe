"""A project folder that `hydra-ppo init` writes fits its card and runs; recipes are what plans say today."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_ppo.cli.flags import load_config
from hydra_ppo.cli.main import main
from hydra_ppo.cli.rlhf_config import read_plan
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.profiling.cli import commands, plan, recipe
from hydra_ppo.profiling.cli.plan import Plan, Search
from hydra_ppo.profiling.cli.project import recipe_text
from hydra_ppo.profiling.cli.recipe import make_recipe
from hydra_ppo.profiling.cli.recipes import CARDS, MODELS, path_of, plan_recipes
from hydra_ppo.profiling.measuring.capture import capture
from hydra_ppo.profiling.subjects.shapes import HUB_NAMES
from tests.profiling.models import CONFIGS, workload
from tests.training import write_model

RECIPES = Path(__file__).parents[3] / "recipes"
FILES = ["README.md", "pairs.jsonl", "ppo.yaml", "reward.py", "sft.yaml"]


@pytest.fixture
def few_choices(monkeypatch):
    """A smaller grid, so that searches take seconds."""
    monkeypatch.setattr(plan, "HOLDS", (None,))
    monkeypatch.setattr(plan, "ROLLOUT_BATCHES", (4,))
    monkeypatch.setattr(plan, "MICROBATCHES", (1, 2))
    monkeypatch.setattr(plan, "RANKS", (8,))
    monkeypatch.setattr(commands, "MOST_WORKERS", 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_project_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    """On a CPU, where no card says how large anything may be; every command of its README that takes its files."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "Base", max_position_embeddings=2048)
    assert main(["init", "--model", "Base", "--prompt", "8", "--response", "8"]) == 0
    assert "no card was named" in capsys.readouterr().out
    project = tmp_path / "base"
    assert names(project) == FILES
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    train = (["sft", "sft.yaml", "--dry-run"], ["sft", "sft.yaml"], ["score", "runs/sft", "pairs.jsonl"], ["ppo", "ppo.yaml"])
    for command in train:
        assert main(command) == 0, (command, capsys.readouterr().err)
    summary = json.loads((project / "runs/ppo/summary.json").read_text())
    assert summary["steps"] == 1  # one pass over what is left of twelve prompts
    assert "eval/independent_before" in summary or any("independent" in name for name in summary)


def test_what_is_written_fits_the_card(few_choices, tmp_path, capsys):
    """The settings of both files, simulated whole: not more than the line above them says, and not more than the card has."""
    write_model(tmp_path / "base", max_position_embeddings=2048)
    CONFIGS["llama"].save_pretrained(tmp_path / "base")
    arguments = ["init", "--model", str(tmp_path / "base"), "--gpu-memory", "480MiB", "--prompt", "12", "--response", "8"]
    assert main([*arguments, "--output", str(tmp_path / "project")]) == 0
    said = capsys.readouterr().out
    sft = load_config(SFTConfig, tmp_path / "project" / "sft.yaml")
    ppo = load_config(PPOConfig, tmp_path / "project" / "ppo.yaml")
    assert (ppo.model.name_or_path, sft.run.output, ppo.epochs) == ("runs/sft", "runs/sft", 1)
    assert (sft.data.max_prompt_tokens, sft.data.max_response_tokens, ppo.rollout.max_new_tokens) == (12, 8, 8)
    assert sft.model.lora == ppo.model.lora
    assert sft.optimizer.name == ppo.optimizer.name
    sizes = workload(
        model=str(tmp_path / "base"),
        quantization=ppo.model.quantization,
        dtype=ppo.model.dtype,
        rank=ppo.model.lora.r,
        prompt=12,
        response=8,
        rollout_batch=ppo.rollout.generation_batch_size,
        microbatch=ppo.microbatch_size,
        score_batch=ppo.rollout.score_batch_size,
        checkpointing=ppo.model.gradient_checkpointing,
    )
    peak = max(phase.bytes for phase in capture(sizes, simulate=True).phases.values())
    assert f"PPO peaks at {peak / 2**20:.1f} MiB" in said


def test_where_nothing_fits_nothing_is_written(tmp_path, monkeypatch, capsys):
    smallest = Plan({"rank": 8}, [], {"rollout": 2 * 2**30, "optimizer": 2**30}, 0, [], workload(model="gpt2"))
    monkeypatch.setattr(plan, "search", lambda *_, **__: Search(2**30, 2**29, 10**6, [], smallest))
    assert main(["init", "--model", "gpt2", "--gpu-memory", "1GiB", "--output", str(tmp_path / "project")]) == 3
    assert "Nothing fits 512.0 MiB usable of 1.0 GiB" in capsys.readouterr().out
    assert not (tmp_path / "project").exists()


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ppo.yaml").write_text("mine")
    assert main(["init", "--model", "gpt2", "--output", str(tmp_path / "mine")]) == 2
    assert (
        capsys.readouterr().err.strip() == f"output={str(tmp_path / 'mine')!r} is not empty; name another folder with --output."
    )
    assert main(["init", "--model", "llama-9"]) == 2
    assert "model='llama-9' is no shipped name" in capsys.readouterr().err


def test_sft_takes_fewer_pairs_at_once_where_as_many_rows_as_in_ppo_do_not_fit(monkeypatch):
    """100 bytes a pair; PPO takes 8 rows at once, as 4 pairs are."""
    simulated = lambda sizes, *_, **__: SimpleNamespace(phases={"update": SimpleNamespace(bytes=100 * sizes.microbatch)})  # noqa: E731
    monkeypatch.setattr(recipe, "capture", simulated)
    ppo = workload(model="gpt2", rollout_batch=8, microbatch=8)
    for usable, pairs, fits in ((400, 4, True), (399, 2, True), (199, 1, True), (99, 1, False)):
        made = make_recipe(Search(0, usable, 0, [Plan({}, [], {"update": 1}, 0, [], ppo)], Plan({}, [], {}, 0, [], ppo)))
        assert made is not None
        assert (made.sft.microbatch, made.sft_fits) == (pairs, fits)
        assert any("Joint SFT does not fit" in line for line in made.lines()) is not fits
    assert make_recipe(Search(0, 400, 0, [], Plan({}, [], {}, 0, [], ppo))) is None


def test_sft_saves_more_than_ppo_or_takes_a_plan_that_costs_more_where_one_pair_does_not_fit(monkeypatch):
    """A layer's input kept on the host spares 30 of 100 bytes, pieces of an MLP 20 more; a base in nf4 spares half."""

    def simulated(sizes, *_, **__):
        size = 100 - 30 * sizes.checkpoint_offload - 20 * (sizes.tile_tokens is not None)
        return SimpleNamespace(phases={"update": SimpleNamespace(bytes=size // (2 if sizes.quantization else 1))})

    monkeypatch.setattr(recipe, "capture", simulated)
    whole, nf4 = (Plan({}, [], {"update": 1}, 0, [], workload(model="gpt2", quantization=held)) for held in (None, "nf4"))
    expected = [(70, None, (True, None)), (50, None, (True, 512)), (49, "nf4", (True, None)), (10, None, (True, 512))]
    for usable, taken, saves in expected:
        made = make_recipe(Search(0, usable, 0, [whole, nf4], whole))
        assert made is not None
        assert (made.plan.workload.quantization, made.sft.checkpoint_offload, made.sft.tile_tokens) == (taken, *saves)
        model = made.sft_settings()["model"]
        assert model == {"checkpoint_offload": True} | ({} if saves[1] is None else {"tile_tokens": 512})
        assert made.sft_fits is (usable > 10)


# The recipes of this repository


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_is_read(path):
    found = read_plan(path, {})
    assert found.sft.model.name_or_path == HUB_NAMES[path.stem]
    assert found.ppo.model.quantization == found.sft.model.quantization


def test_there_is_one_for_each_model():
    assert {path.stem for path in RECIPES.glob("*/*.yaml")} == set(MODELS)
    assert {path.parent.name for path in RECIPES.glob("*/*.yaml")} == {f"{card}GB" for card in CARDS}


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[] if model == MODELS[0] else pytest.mark.long) for model in MODELS]
)
def test_recipes_are_what_a_new_plan_gives(model):
    for card, found in plan_recipes(model).items():
        path = path_of(RECIPES, model, card)
        assert (None if found is None else recipe_text(found, model)) == (path.read_text() if path.exists() else None)
