"""Judge a run by VADER: what its actor says to held-out prompts, beside what it said before PPO.

    python examples/real_model/judge.py --before REFERENCE.jsonl --after ACTOR.jsonl --output JUDGED.json

Both files are of `hydra-ppo generate RUN --role ROLE --prompts FILE --output FILE`, with the same prompts and seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this runs as a file, too
from examples.real_model.rate import read
from examples.real_model.vader import compound


def repeated_4grams(texts: Sequence[str]) -> float:
    """Return the share of runs of four words that stood in the same answer before."""
    total = repeated = 0
    for text in texts:
        words = text.lower().split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def judge(before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """Return mean scores of answers to the same prompts, the gain, and the standard error of its mean, prompt by prompt."""
    scores = [[compound(text) for text in texts] for texts in (before, after)]
    gains = [b - a for a, b in zip(*scores, strict=True)]
    return {
        "answers": len(gains),
        "vader_before": statistics.mean(scores[0]),
        "vader_after": statistics.mean(scores[1]),
        "gain": statistics.mean(gains),
        "gain_se": statistics.stdev(gains) / math.sqrt(len(gains)),
        "repeated_4grams_before": repeated_4grams(before),
        "repeated_4grams_after": repeated_4grams(after),
        "different_answers_after": len(set(after)) / len(after),
    }


def question(prompt: str) -> str:
    """Return what the user says in a rendered prompt of ChatML."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a run's answers by VADER.")
    for name in ("before", "after", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    before, after = read(args.before), read(args.after)
    texts = [line["reference"]["response"] for line in before], [line["actor"]["response"] for line in after]
    lines = zip(before, *texts, strict=True)
    samples = [
        {"prompt": question(line["prompt"]), "before": [a, compound(a)], "after": [b, compound(b)]} for line, a, b in lines
    ]
    found = judge(*texts) | {"samples": samples}
    args.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print({key: value for key, value in found.items() if key != "samples"})


if __name__ == "__main__":
    main()
