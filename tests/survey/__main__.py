"""Try every causal LM class of the installed transformers and write docs/families.md.

    python -m tests.survey [NAME ...] [--write]

Each class is built from a tiny config and held against separate models, in values, gradients and sampling, with adapters on all
layers and with one layer as a trunk. The exit code is 1 where something was silently wrong, or raised another error than a line
of ours.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

TOLERANCE = 1e-4
"""Largest difference that is exact: nats of a log-prob, gradients relative to the largest element."""

SECONDS = 300

HOW = {
    "Decoder": "exact",
    "ModelCacheDecoder": "exact; samples on transformers' own cache, slower",
    "RecomputingDecoder": "exact; samples without a cache, much slower",
}

OUTCOMES = {
    "exact": "the same values, gradients and samples as separate models, to 1e-4",
    "refused": "one line when the model is built, and why",
    "not built": "no tiny model of it could be made, or transformers itself cannot train it: nothing was compared",
    "wrong": "accepted, and different",
    "raised": "another error than a line of ours",
}


class Line(NamedTuple):
    """What came of one class."""

    model_type: str
    outcome: str
    text: str
    seconds: float


def examine(model_type: str) -> Line:
    """Build a family, compare it with one and with no trunk layer, and say in a line what came of it."""
    import torch

    from hydra_ppo.errors import HydraError
    from tests.survey.oracle import Untrainable, compare
    from tests.survey.tiny import tiny_model

    begun = time.perf_counter()

    def line(outcome: str, text: str) -> Line:
        return Line(model_type, outcome, " ".join(text.split())[:300], time.perf_counter() - begun)

    try:
        try:
            tiny_model(model_type)(input_ids=torch.tensor([[5, 6, 7]]))
        except Exception as error:
            return line("not built", f"{type(error).__name__}: {error}"[:140])
        found = [compare(lambda: tiny_model(model_type), trunk_layers=count) for count in (0, 1)]
    except Untrainable as error:
        return line("not built", f"transformers itself: {error}"[:140])
    except HydraError as error:
        return line("refused", str(error).partition("; use ")[0])
    except Exception as error:
        return line("raised", f"{type(error).__name__}: {error}"[:200])
    worst = max(found, key=lambda one: one.largest)
    if worst.largest <= TOLERANCE:
        return line("exact", f"{HOW[found[0].decoder]} ({worst.largest:.0e})")
    return line("wrong", ", ".join(f"{what} {value:.2g}" for what, value in worst.differences.items() if value > TOLERANCE))


def examine_for(model_type: str) -> Line:
    """Do so within `SECONDS`, in a process that does nothing else."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return examine(model_type)
    finally:
        signal.alarm(0)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def page(lines: list[Line]) -> str:
    """Return docs/families.md."""
    import peft
    import torch
    import transformers

    counts = Counter(line.outcome for line in lines)
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    head = [
        "# Families",
        "",
        "Written by `make families`, which builds every class that transformers maps to a causal LM from a tiny config",
        "with random weights and holds it against separate models: plain transformers and PEFT, every row alone. It is true of",
        f"{versions}, in fp32 on a CPU; a class is no promise for every checkpoint of it.",
        "",
        "No family is known by its name: when a model is built, passes over a few tokens are compared with one another, and",
        "before the first rollout its decoding with a whole pass (`model.check`). What differs is refused in a line, or",
        "sampled more slowly.",
        "",
        "| outcome | classes | meaning |",
        "|---|---|---|",
        *(f"| {name} | {counts[name]} | {what} |" for name, what in OUTCOMES.items()),
        "",
        "| model type | outcome |",
        "|---|---|",
        *(f"| `{line.model_type}` | {_cell(line)} |" for line in lines),
    ]
    return "\n".join(head) + "\n"


def _cell(line: Line) -> str:
    text = line.text.replace("|", "\\|")
    return text if line.outcome == "exact" else f"**{line.outcome}**: {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all of them when left out")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    from tests.survey.tiny import names

    lines = []
    with ProcessPoolExecutor(args.workers) as pool:
        for line in pool.map(examine_for, args.names or names()):
            print(f"{line.model_type:28} {line.outcome:10} {line.seconds:6.1f} s  {line.text[:150]}", flush=True)
            lines.append(line)
    counts = Counter(line.outcome for line in lines)
    print(", ".join(f"{counts[name]} {name}" for name in OUTCOMES))
    if args.write:
        PAGE.write_text(page(lines), encoding="utf-8")
        print(f"wrote {PAGE.name}")
    return 1 if counts["wrong"] or counts["raised"] else 0


if __name__ == "__main__":
    sys.exit(main())
