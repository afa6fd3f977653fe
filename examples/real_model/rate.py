"""Rate what the model itself says by VADER: a list of answers and ratings for each prompt, for joint SFT and reward modelling.

    python examples/real_model/rate.py --prompts PROMPTS.jsonl --answers ANSWERS.jsonl --output RATED.jsonl

ANSWERS is what `hydra-ppo generate RUN --role base --prompts PROMPTS --samples N --output ANSWERS` wrote. What comes of it
is read with `data.format: rated`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this runs as a file, too
from examples.real_model.vader import compound


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rated(prompts: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each prompt with the answers it got and how cheerful they are."""
    samples, rest = divmod(len(answers), len(prompts))
    if rest or samples < 2:
        raise SystemExit(
            f"{len(answers)} answers are not two or more for each of {len(prompts)} prompts; give both files of one run."
        )
    found = []
    for i, row in enumerate(prompts):
        texts = [line["base"]["response"] for line in answers[i * samples : (i + 1) * samples]]
        turns = [[{"role": "assistant", "content": text}] for text in texts]
        found.append({"prompt": row["prompt"], "responses": turns, "ratings": [compound(text) for text in texts]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Rate sampled answers by VADER.")
    for name in ("prompts", "answers", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    found = rated(read(args.prompts), read(args.answers))
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    print(f"{len(found)} prompts with {len(found[0]['responses'])} rated answers each, in {args.output}")


if __name__ == "__main__":
    main()
