"""Other methods on the real model: runs of PPO with a setting changed, over seeds, as a table.

    python examples/real_model/methods.py --rows gae,rloo,ptx --seeds 0,1,2 [--output runs/real_model_methods]

Every row of a seed is a run of the CLI in a folder of its own. One that is finished is not run again, and one that was stopped
goes on, so that a call can be repeated until all is there. Rows with heads (`--rows one-head,five-heads,rehearsal`) train joint
SFT and reward heads first, on pairs of which a quarter have the wrong label. Each run takes five to ten minutes of one core;
OMP_NUM_THREADS=1 and two calls with different seeds use two.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this runs as a file, too
from examples.real_model.run import CLI, HERE, SAMPLES, Steps
from hydra_ppo.profiling.learning.shared import spread

FOUR = ("--rollout.samples_per_prompt", 4)
NOISE = 0.25
"""Of the labels that reward heads learn from, how many are wrong."""
HELD_OUT = 60
"""Prompts whose pairs no head learns from; their labels are right."""

ON_FUNCTION: dict[str, Sequence[Any]] = {
    "gae": (),
    "reinforce": ("--advantage", "reinforce"),
    "group": ("--advantage", "group", *FOUR),
    "rloo": ("--advantage", "rloo", *FOUR),
    "GRPOVI": ("--advantage", "group", "--group_std", "false", "--variance_increase", "reference", *FOUR),
    "ptx": ("--ptx.data", "best.jsonl", "--ptx.coef", 0.1),
    "kl-js": ("--kl.estimator", "js"),
    "kl-none": ("--kl.estimator", "none"),
    "merged": ("--rollout.weights", "merged-bf16"),
}
"""Settings of PPO on VADER itself; names that end in .jsonl are files of the data folder."""

ON_HEADS: dict[str, tuple[int, str, Sequence[Any]]] = {
    "one-head": (1, "mean", ()),
    "five-heads": (5, "mean", ()),
    "five-heads-minimum": (5, "minimum", ()),
    "five-heads-lcb": (5, "lcb", ()),
    "rehearsal": (1, "mean", ("--rehearsal.data", "best.jsonl")),
}
"""Reward heads, how they are combined, and settings of PPO on them; VADER reads along."""

VADER = "eval/reward/reward"
"""Metric of the held-out answers' mean score by VADER, in a run on heads: it bears the function's name."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*ON_FUNCTION, *ON_HEADS)
    parser.add_argument("--rows", default="gae", help=f"names with commas between them, among {', '.join(known)}")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between them")
    parser.add_argument("--output", type=Path, default=Path("runs/real_model_methods"), help="folder of model, data and runs")
    args = parser.parse_args()
    rows, seeds = args.rows.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := [row for row in rows if row not in known]:
        parser.error(f"rows={unknown[0]!r} is unknown; choose among {', '.join(known)}")
    ground = Ground(args.output)
    ground.prepare(rated=any(row in ON_HEADS or row == "ptx" for row in rows))
    for seed in seeds:
        for row in rows:
            ground.run(row, seed)
    Console(width=140).print(table(args.output, rows, seeds), markup=False, highlight=False)
    return 0


class Ground:
    """The model and the data that all rows have in common, and where their runs lie.

    Args:
        output: folder; base and data are made where they are missing, with seed 0, so that all seeds are judged alike.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.data, self.base, self.steps = output, output / "data", output / "base", Steps()

    def prepare(self, rated: bool) -> None:
        """Make what is missing: base and instructions; with `rated` pairs of the base's own answers, too."""
        if not (self.output / "dtype").is_file():
            self.steps("prepare", HERE / "prepare.py", "--output", self.output, "--seed", 0)
        if not rated or (self.data / "best.jsonl").is_file():
            return
        asked, said = self.data / "train.jsonl", self.data / "said.jsonl"
        self.run("gae", 0)
        words = [self.output / "gae-0", "--role", "base", "--prompts", asked, "--samples", SAMPLES, "--output", said]
        self.steps("sample", *CLI, "generate", *words, "--seed", 0, "--batch-size", 64)
        rated_file = self.data / "rated.jsonl"
        self.steps("rate", HERE / "rate.py", "--prompts", asked, "--answers", said, "--output", rated_file)
        write_pairs(rated_file, self.data)

    def run(self, row: str, seed: int) -> None:
        """Run PPO with a row's settings, and joint SFT before it where the row has heads; nothing where that is done."""
        if row in ON_FUNCTION:
            model, config, changes = self.base, HERE / "ppo.yaml", ON_FUNCTION[row]
        else:
            heads, combined, changes = ON_HEADS[row]
            model, config = self.joint(heads, seed), self.with_heads(combined)
        files = [self.data / word if str(word).endswith(".jsonl") else word for word in changes]
        prompts = ["--data.train", self.data / "train.jsonl", "--data.eval", self.data / "eval.jsonl", "--eval_prompts", 128]
        self.command(f"{row}-{seed}", "ppo", config, "--model.name_or_path", model, *prompts, "--run.seed", seed, *files)

    def joint(self, heads: int, seed: int) -> Path:
        """Return the run of joint SFT with so many heads, on pairs with wrong labels."""
        rows = ["--data.train", self.data / f"noisy-{seed}.jsonl", "--data.eval", self.data / "right.jsonl"]
        rows += ["--data.format", "pairs", "--data.pairs_per_prompt", "null", "--data.eval_fraction", 0]
        if not (self.data / f"noisy-{seed}.jsonl").is_file():
            write_noisy(self.data / "rated.jsonl", self.data, seed)
        words = [HERE / "sft.yaml", "--model.name_or_path", self.base, *rows, "--reward_heads", heads, "--run.seed", seed]
        return self.command(f"sft-{heads}-{seed}", "sft", *words)

    def with_heads(self, combined: str) -> Path:
        """Return the file of PPO on heads, with the way that several of them are combined."""
        text = (HERE / "ppo_head.yaml").read_text(encoding="utf-8")
        path = self.output / f"ppo_{combined}.yaml"
        path.write_text(text.replace("- kind: head\n", f"- kind: head\n      aggregate: {combined}\n"), encoding="utf-8")
        return path

    def command(self, name: str, kind: str, *words: object) -> Path:
        """Run a training into a folder of this name, or go on with it; return the folder."""
        folder = self.output / name
        if not (folder / "summary.json").is_file():
            dtype = (self.output / "dtype").read_text()
            self.steps(name, *CLI, kind, *words, "--model.dtype", dtype, "--run.output", folder, "--resume")
        return folder


def pairs_of(row: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """Return a prompt's pairs of answers that are rated apart, better first, those furthest apart before others."""
    ratings, answers = row["ratings"], row["responses"]
    apart = [
        (ratings[i] - ratings[j], i, j) for i in range(len(ratings)) for j in range(len(ratings)) if ratings[i] > ratings[j]
    ]
    best = sorted(apart, key=lambda found: -found[0])[:most]
    return [{"prompt": row["prompt"], "chosen": answers[i], "rejected": answers[j]} for _, i, j in best]


def write_pairs(rated: Path, folder: Path) -> None:
    """Write best.jsonl, the best answer of each prompt against its worst."""
    rows = [json.loads(line) for line in rated.read_text(encoding="utf-8").splitlines()]
    _write(folder / "best.jsonl", [pair for row in rows for pair in pairs_of(row, 1)])


def write_noisy(rated: Path, folder: Path, seed: int) -> None:
    """Write right.jsonl, two pairs of each held-out prompt, and noisy-SEED.jsonl, those of the others with wrong labels."""
    rows = [json.loads(line) for line in rated.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    _write(folder / "right.jsonl", [pair for row in rows[:HELD_OUT] for pair in pairs_of(row, 2)])
    draw = random.Random(seed)
    noisy = [pair for row in rows[HELD_OUT:] for pair in pairs_of(row, 2)]
    for pair in noisy:
        if draw.random() < NOISE:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    _write(folder / f"noisy-{seed}.jsonl", noisy)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def table(output: Path, rows: Sequence[str], seeds: Sequence[int]) -> str:
    """Return a table in Markdown of what has been run; differences are to `gae`, of heads to `one-head`."""
    found = {
        (row, seed): summary for row in (*rows, "gae", "one-head") for seed in seeds if (summary := _summary(output, row, seed))
    }
    lines = ["| row | seeds | score before | score after | less the first | KL, nats | repeated 4-grams after, % |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        there = [seed for seed in seeds if (row, seed) in found]
        first = "one-head" if row in ON_HEADS else "gae"
        both = [seed for seed in there if (first, seed) in found and row != first]

        def of(key: str, times: int = 1, row: str = row, there: Sequence[int] = there) -> str:
            return written([times * found[row, seed][key] for seed in there])

        gaps = [found[row, seed]["eval_scores_after"] - found[first, seed]["eval_scores_after"] for seed in both]
        cells = [
            of("eval_scores_before"),
            of("eval_scores_after"),
            written(gaps),
            of("eval_kl"),
            of("eval_repeated_4grams_after", 100),
        ]
        lines.append(f"| {row} | {len(there)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(values: Sequence[float]) -> str:
    """Return mean ± standard error; nothing where there is nothing."""
    return spread(values) if values else ""


def _summary(output: Path, row: str, seed: int) -> dict[str, Any] | None:
    """Return what a run came to. Of a run on heads the score is VADER's, which counts for nothing there."""
    path = output / f"{row}-{seed}" / "summary.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if row in ON_HEADS:
        steps = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        read = [step[VADER] for step in steps if step.get(VADER) is not None]
        found["eval_scores_before"], found["eval_scores_after"] = read[0], read[-1]
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"a run ended with code {error.returncode}; its message stands above. The same call goes on.")
