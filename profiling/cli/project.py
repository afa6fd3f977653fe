"""Writes a folder to begin in: settings of both trainings, a reward function, example data and how to go on."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hydra_ppo.config.reading import nest, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.config.writing import inline
from hydra_ppo.profiling.cli.recipe import Recipe, ppo_settings
from hydra_ppo.profiling.workload import Workload

WIDTH = 110

REWARD = '''"""Rewards of your own. ppo.yaml names them as reward:score, this file and the function."""

from __future__ import annotations


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Return one number for each response: the higher, the better.

    Columns of the data are given too, by name: add them as arguments. This one likes answers that end as sentences do.
    """
    return [1.0 if response.rstrip().endswith((".", "!", "?")) else 0.0 for response in responses]
'''

EXAMPLES = [
    ("How do I keep bread fresh?", "Keep it in a paper bag and freeze what you do not eat within two days.", "Bread is old."),
    ("What is the capital of Peru?", "The capital of Peru is Lima.", "I like Peru"),
    ("Why is the sky blue?", "Air scatters short, blue waves of light more than long, red ones.", "Because it is blue"),
    ("How long do I boil an egg?", "Six minutes for a soft yolk, ten for a firm one.", "It depends on many things in life"),
    ("Name a prime number above 20.", "23 is a prime number.", "I think it is 21"),
    ("How do I thank a colleague?", "Say what they did and how it helped you.", "You do not"),
    ("What does a comma do?", "It parts the pieces of a sentence where a reader would pause.", "comma comma comma"),
    ("Is it safe to mix bleach and vinegar?", "No. Together they set free chlorine gas.", "Sure, it cleans well"),
    ("What is 12 times 12?", "12 times 12 is 144.", "A number"),
    ("How do plants eat?", "They make sugar from light, water and carbon dioxide.", "With their mouths"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "A writer wrote it, i think"),
    ("How do I fall asleep faster?", "Go to bed at the same time each night and leave the phone outside.", "Just sleep"),
]
"""Prompt, the better answer, the worse one."""


NO_CARD = "Sizes are the defaults: no card was named, and there is no GPU here."


def sft_content(recipe: Recipe | None, workload: Workload) -> dict[str, Any]:
    """Return what sft.yaml holds."""
    own = {} if recipe is None else recipe.sft_settings()
    shared = _shared(recipe, workload)
    shared["model"] |= own.pop("model", {})
    return {**shared, "run": {"output": "runs/sft"}, **own}


def ppo_content(recipe: Recipe | None, workload: Workload) -> dict[str, Any]:
    """Return what ppo.yaml holds."""
    shared = _shared(recipe, workload)
    shared["model"]["name_or_path"] = "runs/sft"
    own: dict[str, Any] = {"rollout": {"max_new_tokens": workload.response}}
    own = own if recipe is None else ppo_settings(recipe.plan.workload)
    judged = {"eval_every": 10, "eval_rewards": [{"kind": "function", "target": "reward:score"}]}
    return {**shared, "run": {"output": "runs/ppo"}, "epochs": 1, **own, **judged}


def _shared(recipe: Recipe | None, workload: Workload) -> dict[str, Any]:
    data = {"train": "pairs.jsonl", "max_prompt_tokens": workload.prompt, "max_response_tokens": workload.response}
    given = {"model": {"name_or_path": workload.model}, "data": data}
    shared = given if recipe is None else recipe.shared_settings()
    shared["data"] |= {"eval_fraction": 0.1}
    return shared


def with_comments(kind: type, content: Mapping[str, Any]) -> str:
    """Write settings as YAML, each that is not its default under its help."""
    known = settings_of(kind)
    lines: list[str] = []

    def put(node: Mapping[str, Any], prefix: str, indent: str) -> None:
        for name, value in node.items():
            if (setting := known.get(prefix + name)) is None:
                lines.append(f"{indent}{name}:")
                put(value, f"{prefix}{name}.", indent + "  ")
                continue
            start = indent + "# "
            lines.extend(textwrap.wrap(setting.help, WIDTH, initial_indent=start, subsequent_indent=start))
            lines.append(f"{indent}{name}: {inline(value)}")

    put(changed_only(kind, content), "", "")
    return "\n".join(lines) + "\n"


def changed_only(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings without those that are their defaults."""
    known = settings_of(kind)
    flat: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            if (setting := known.get(prefix + name)) is None:
                walk(value, f"{prefix}{name}.")
            elif setting.required or value != setting.default:
                flat[prefix + name] = value

    walk(content, "")
    return nest(flat)


def write_project(folder: Path, recipe: Recipe | None, workload: Workload) -> list[Path]:
    """Write the project; return its files.

    Args:
        folder: where; made where it is not there.
        recipe: what fits the card; None leaves sizes at their defaults.
        workload: model and lengths.
    """
    said = [NO_CARD] if recipe is None else recipe.lines()
    head = "".join(f"# {line}\n" for text in said for line in textwrap.wrap(text, WIDTH))
    sft = with_comments(SFTConfig, sft_content(recipe, workload))
    ppo = with_comments(PPOConfig, ppo_content(recipe, workload))
    files = {
        "sft.yaml": f"# Joint SFT and reward model: hydra-ppo sft sft.yaml\n{head}{sft}",
        "ppo.yaml": f"# PPO, after SFT: hydra-ppo ppo ppo.yaml\n{head}{ppo}",
        "reward.py": REWARD,
        "pairs.jsonl": "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in EXAMPLES),
        "README.md": _readme(sft_content(recipe, workload)["model"]["name_or_path"], said),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


COLUMNS = ("prompt", "chosen", "rejected")


def _readme(model: str, said: list[str]) -> str:
    return f"""# RLHF of {model}

{chr(10).join(said)}

| file | what it is |
|---|---|
| `pairs.jsonl` | twelve example pairs: put your own in their place, some thousands |
| `sft.yaml` | SFT model and reward model, trained jointly on the pairs |
| `ppo.yaml` | PPO from there, on the prompts of the same file |
| `reward.py` | a reward function of your own; as it is, it judges held-out answers and never enters training |

```sh
hydra-ppo sft sft.yaml --dry-run      # checks settings, files and one row as it is read; loads no weights
hydra-ppo sft sft.yaml
hydra-ppo score runs/sft pairs.jsonl  # how often the reward head prefers the chosen answer
hydra-ppo ppo ppo.yaml
hydra-ppo report runs/sft runs/ppo    # one page of both; each run wrote its own too
hydra-ppo generate runs/ppo --prompt "How do I keep bread fresh?" --both
hydra-ppo export runs/ppo --output actor
```

To train on the function instead of the learned head, or on both, write in `ppo.yaml`:
`reward: {{sources: [{{kind: function, target: "reward:score"}}]}}`, and leave `eval_rewards` out or name another judge there.
Every setting with its help: `hydra-ppo ppo --print-config`.
"""


def recipe_text(recipe: Recipe, name: str) -> str:
    """Return one file of `hydra-ppo rlhf`.

    Args:
        name: of the model, in the folder that the file names.
    """
    content = {
        "output": f"runs/{name}",
        **changed_only(PPOConfig, recipe.shared_settings()),
        **({"sft": sft} if (sft := changed_only(SFTConfig, recipe.sft_settings())) else {}),
        "ppo": {"epochs": 1, **changed_only(PPOConfig, ppo_settings(recipe.plan.workload))},
    }
    head = [
        f"{name}: SFT, reward model and PPO from one file, hydra-ppo rlhf FILE.",
        *recipe.lines(),
    ]
    comments = "".join(f"# {line}\n" for text in head for line in textwrap.wrap(text, WIDTH))
    return comments + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=WIDTH)
