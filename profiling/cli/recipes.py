"""`python -m hydra_ppo.profiling.cli.recipes`: plans the recipes of this repository anew, for every model and card.

One folder for each card and one file for each model that fits it, settings of `hydra-ppo rlhf`; README.md is the table.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from hydra_ppo.profiling.cli.plan import search_cards
from hydra_ppo.profiling.cli.project import recipe_text
from hydra_ppo.profiling.cli.recipe import Recipe, make_recipe
from hydra_ppo.profiling.reporting.report import format_bytes
from hydra_ppo.profiling.workload import Workload

CARDS = (6, 8, 12, 16, 24, 48, 80)
"""GB, as cards are sold: each holds as many GiB."""
MODELS = (
    *("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "gemma-3-4b", "mistral-7b"),
    *("qwen2.5-7b", "llama-3.1-8b", "qwen3-8b", "qwen2.5-32b"),
)
LENGTHS = {"prompt": 512, "response": 512}


def plan_recipes(model: str, cards: Sequence[int] = CARDS, workers: int = 1) -> dict[int, Recipe | None]:
    """Return the recipe of each card, in GiB; None where the model does not fit it."""
    sizes = [card * 2**30 for card in cards]
    found = search_cards(Workload(model=model, **LENGTHS), sizes, workers=workers)  # type: ignore[arg-type]  # by name
    return {card: make_recipe(each) for card, each in zip(cards, found, strict=True)}


def path_of(folder: Path, model: str, card: int) -> Path:
    """Return where a recipe lies."""
    return folder / f"{card}GB" / f"{model}.yaml"


def write_recipes(folder: Path, model: str, recipes: dict[int, Recipe | None]) -> None:
    """Write one model's recipes, and remove those of cards that it does not fit any more."""
    for card, recipe in recipes.items():
        path = path_of(folder, model, card)
        if recipe is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe_text(recipe, model), encoding="utf-8")


def table_row(model: str, recipes: dict[int, Recipe | None]) -> str:
    """Return one row of the table: how the base is held, rows of a micro-batch and rows decoded together, peak."""
    cells = []
    for card, recipe in recipes.items():
        if recipe is None:
            cells.append("-")
            continue
        w = recipe.plan.workload
        text = f"{w.quantization or w.dtype} {w.microbatch}/{w.rollout_batch}, {format_bytes(recipe.plan.peak_bytes)}"
        cells.append(f"[{text}]({card}GB/{model}.yaml)")
    return f"| {model} | {' | '.join(cells)} |"


HEAD = """# Recipes

What `hydra-ppo plan` finds for each model and card, at prompts and answers of 512 tokens each, as files of `hydra-ppo rlhf`:
joint SFT and reward model, PPO, evaluation, export. Copy the one of your card, name your preference pairs in `data.train`, and
run it:

```sh
cp recipes/8GB/llama-3.1-8b.yaml rlhf.yaml
hydra-ppo rlhf rlhf.yaml --dry-run
hydra-ppo rlhf rlhf.yaml
```

The table shows how the base is held, rows of a micro-batch and rows decoded together, and the simulated peak of PPO; 3% of the
card and 0.4 GiB stay free for what no simulation sees. `-`: it does not fit. Gemma 3 is its language model alone: the vision
tower of the checkpoint, 0.42 billion parameters, comes on top. None of them was run on its card. Other lengths, models and
cards: `hydra-ppo init --model NAME --gpu-memory SIZE --response 256`. `make recipes` plans all of them again, and
`make test-long` holds them against new plans.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan and write the recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("recipes"))
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args(arguments)
    rows = []
    for number, model in enumerate(options.models, 1):
        recipes = plan_recipes(model, workers=min(os.cpu_count() or 1, 4))
        write_recipes(options.output, model, recipes)
        rows.append(table_row(model, recipes))
        print(f"{number}/{len(options.models)} {model}: {sum(each is not None for each in recipes.values())} cards", flush=True)
    if tuple(options.models) == MODELS:
        columns = " | ".join(f"{card} GB" for card in CARDS)
        table = "\n".join([f"| model | {columns} |", "|---" * (len(CARDS) + 1) + "|", *rows])
        (options.output / "README.md").write_text(HEAD + table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
