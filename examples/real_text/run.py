"""Run the real-text example end to end and check what came of it.

    python examples/real_text/run.py [--output runs/real_text] [--seed 0] [--steps N]

Three commands, as a user would type them: `prepare.py`, `hydra-ppo sft`, `hydra-ppo ppo`. What they leave in their run
folders is then held against the bounds below; the exit code is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PAIR_ACCURACY = 0.75
STANDARD_ERRORS = 3
NATS = 30.0


def command(*words: object) -> None:
    line = [str(word) for word in words]
    print("$ python", " ".join(line), flush=True)
    subprocess.run([sys.executable, *line], check=True)


def checks(sft: dict[str, Any], ppo: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return (what, found, met) of each bound."""
    gain = ppo["eval_scores_after"] - ppo["eval_scores_before"]
    errors = gain / ppo["eval_scores_gain_se"]
    before, after = ppo["eval_repeated_4grams_before"], ppo["eval_repeated_4grams_after"]
    return [
        (
            f"held-out pair accuracy, at least {PAIR_ACCURACY}",
            f"{sft['eval/reward_accuracy']:.3f}",
            sft["eval/reward_accuracy"] >= PAIR_ACCURACY,
        ),
        (
            f"gain of the held-out score, at least {STANDARD_ERRORS} standard errors",
            f"{gain:.3f} = {errors:.1f} s.e.",
            errors >= STANDARD_ERRORS,
        ),
        (f"KL, below {NATS:.0f} nats per response", f"{ppo['eval_kl']:.2f}", ppo["eval_kl"] < NATS),
        ("repeated 4-grams, not doubled", f"{before:.4f} -> {after:.4f}", after <= 2 * before),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/real_text"), help="folder of data, base and runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage")
    parser.add_argument("--steps", type=int, help="pretraining steps; the script's own number where left out")
    args = parser.parse_args()
    out, begun = args.output, time.perf_counter()
    steps = ["--steps", args.steps] if args.steps else []
    data = ["--data.train", out / "data/train.jsonl", "--data.eval", out / "data/eval.jsonl", "--run.seed", args.seed]
    command(HERE / "prepare.py", "--output", out, "--seed", args.seed, *steps)
    cli = ("-m", "hydra_ppo.cli")
    sft = ["--model.name_or_path", out / "base", "--run.output", out / "sft", "--run.overwrite", "true"]
    ppo = ["--model.name_or_path", out / "sft", "--run.output", out / "ppo", "--run.overwrite", "true"]
    command(*cli, "sft", HERE / "sft.yaml", *data, *sft)
    command(*cli, "ppo", HERE / "ppo.yaml", *data, *ppo)
    command(*cli, "inspect", out / "ppo")

    summaries = [json.loads((out / stage / "summary.json").read_text()) for stage in ("sft", "ppo")]
    rows = checks(*summaries)
    table = Table(
        title="Real text", caption=f"{time.perf_counter() - begun:.0f} s in all; plots in {out}/sft/plots and {out}/ppo/plots"
    )
    for column in ("what", "found", "met"):
        table.add_column(column)
    for what, found, met in rows:
        table.add_row(what, found, "yes" if met else "NO")
    Console().print(table)
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
