"""Make preference pairs of what the model itself says, labelled by VADER.

    python examples/real_model/pairs.py --prompts PROMPTS.jsonl --answers ANSWERS.jsonl --output PAIRS.jsonl

ANSWERS is what `hydra-ppo generate RUN --role base --prompts PROMPTS --samples N --output ANSWERS` wrote: of the answers to a
prompt, the most cheerful one is chosen, the least cheerful one rejected.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this runs as a file, too
from examples.real_model.vader import compound

GAP = 0.3  # of compound scores: answers that are nearly alike teach little


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(prompts: list[dict[str, Any]], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a pair for each prompt whose best and worst answers are far enough apart."""
    samples, rest = divmod(len(answers), len(prompts))
    if rest or samples < 2:
        raise SystemExit(
            f"{len(answers)} answers are not two or more for each of {len(prompts)} prompts; give both files of one run."
        )
    found = []
    for i, row in enumerate(prompts):
        texts = [line["base"]["response"] for line in answers[i * samples : (i + 1) * samples]]
        worst, *_, best = sorted(texts, key=compound)
        if compound(best) - compound(worst) >= GAP and worst.strip():
            turns = [[{"role": "assistant", "content": text}] for text in (best, worst)]
            found.append({"prompt": row["prompt"], "chosen": turns[0], "rejected": turns[1]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make preference pairs of sampled answers, labelled by VADER.")
    for name in ("prompts", "answers", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    prompts = read(args.prompts)
    found = pairs(prompts, read(args.answers))
    args.output.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found), encoding="utf-8")
    print(f"{len(found)} pairs of {len(prompts)} prompts, in {args.output}")


if __name__ == "__main__":
    main()
