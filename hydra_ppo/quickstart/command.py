"""`hydra-ppo quickstart`: its arguments. torch is imported once they are known to be good."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra_ppo.cli.main import Command
from hydra_ppo.cli.parser import Parser, check_folder
from hydra_ppo.data.sources import local_path


def quickstart(arguments: list[str]) -> None:
    """Run `hydra-ppo quickstart`."""
    parser = Parser("quickstart", "Run the whole pipeline on a tiny model and corpus, in minutes, on a CPU.")
    parser.add_argument("--output", type=local_path, default=Path("runs/quickstart"), metavar="DIR", help="Folder to write to.")
    parser.add_argument("--seed", type=_seed, default=0, help="Seed of every random source.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier quickstart left there.")
    options = parser.parse_args(arguments)
    check_folder("output", options.output)
    from hydra_ppo.quickstart import run

    run.main(options.output, options.seed, options.overwrite)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


QUICKSTART: Command = ("run the whole pipeline on a tiny model, on a CPU", quickstart)
