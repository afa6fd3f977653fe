"""What do ensembles, losses, floor pairs and heads on stored states give? Reward models on the quickstart's task.

`python -m hydra_ppo.profiling.learning.reward_models --table NAME --seeds 0,1,2 --pairs 4000` measures the rows of a table,
each on each seed, and prints means with standard errors over the seeds, and differences to the first row of a group, seed by
seed. A row on a seed is a JSON file in `OUTPUT/seed-S/NAME`; what is there is not measured again, nor is a model trained again
that is there, so a call that was ended goes on where it was, and tables in one folder share their models. Held-out pairs are
1000, of openings that no training pair has, and their labels are right. Of each run the last model is measured, not the best,
so that right labels have no say in it.

- `ensembles`: joint SFT on `--pairs` with a quarter of the labels wrong, one run with one head and one with five, then the
  quickstart's PPO against one head, and against what five say together. Win rates are against the answers of the SFT run
  with one head; accuracy and ECE are of what the heads say together.
- `losses`: the same SFT with each loss of the reward model. ECE is given against right labels, and against labels as noisy
  as those of the training, which are all that a model can be calibrated to.
- `floor`: a language model is tuned on `--pairs` answers without labels, and from it reward models alone on 64 to 4000 other
  pairs, a tenth of their labels wrong. Each label is seen eight times, but no run sees more than 4000 (64: 8, 256: 8, 1000:
  4, 4000: 1). Floor pairs come on top, in a seventh more steps, so that labels are seen as often with them as without.
- `heads`: heads on stored states of that language model and of those pairs. One pass against a logistic regression fitted to
  the end on all pairs, by Newton's steps, and against `heads --kind linear`, with the seconds of the processor that each
  took, its own choices included; labels picked as label-next does against as many at random; self-labelling from 15% of the
  labels against those alone and against all.

Minutes of one core of an AMD EPYC, estimated from 1.6 for a joint SFT on 13000 pairs and 0.8 for a PPO run there:

| table | a row | a seed, `--pairs 13000` | a seed, `--pairs 4000` |
|---|---|---|---|
| `ensembles` | 0.9, and two SFT runs | 7 | 6 |
| `losses` | one SFT run | 4; 3 after `ensembles` | 2; 1 after `ensembles` |
| `floor` | 0.1 to 0.7, and SFT without labels | 6 | 5 |
| `heads` | below 0.1, `self-labelled` 1; states 0.5; SFT as `floor` | 3; 2 after `floor` | 2; 2 after `floor` |
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.profiling.learning import head_rows, reward_rows
from hydra_ppo.profiling.learning.reward_ground import Ground, Numbers, Row, slug
from hydra_ppo.profiling.learning.shared import kept, spread
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.runtime.tables import print_table

PAIRS = 13000


@dataclass(frozen=True)
class Kind:
    """A table.

    Attributes:
        rows: by name.
        columns: keys of a row's numbers, with what heads them.
        compared: of these the differences to the first row of a group are shown.
    """

    rows: Mapping[str, Row]
    columns: Mapping[str, str]
    compared: Sequence[str]


RIGHT = {"accuracy": "accuracy", "ece": "ECE"}

TABLES = {
    "ensembles": Kind(
        reward_rows.ensembles(),
        {
            **RIGHT,
            "member_accuracy": "accuracy of a head",
            "gold_before": "gold before",
            "gold_after": "gold after",
            "win_rate": "win rate",
            "kl": "KL, nats",
        },
        ("accuracy", "gold_after"),
    ),
    "losses": Kind(
        reward_rows.losses(),
        {
            **RIGHT,
            "ece_noisy": "ECE, noisy labels",
            "score_mean": "mean score",
            "score_sd": "sd of scores",
            "perplexity": "perplexity",
        },
        ("accuracy", "ece", "ece_noisy"),
    ),
    "floor": Kind(reward_rows.floor(), {**RIGHT, "score_sd": "sd of scores"}, ("accuracy", "ece")),
    "heads": Kind(
        head_rows.heads(),
        {**RIGHT, "processor": "processor, s", "labelled": "labelled itself", "agreement": "as hidden labels"},
        ("accuracy",),
    ),
}


@dataclass(frozen=True)
class Measured:
    """A row on one seed."""

    row: str
    seed: int
    numbers: Numbers


def measure_rows(
    folder: Path, table: str, rows: Sequence[str], seeds: Sequence[int], pairs: int, say: Callable[[str], None] = print
) -> list[Measured]:
    """Measure rows of a table on every seed; what `folder` already holds is not measured again.

    Args:
        folder: keeps data, models and one JSON file per row and seed.
        table: of `TABLES`.
        rows: of that table.
        seeds: of corpora, models, training and sampling.
        pairs: that the SFT models are trained on.
        say: takes a line of progress per row and seed, also of one that fails: the others are measured all the same.

    Returns:
        What was measured; a row on a seed that failed is not among it.

    Raises:
        ConfigError: where the folder was begun with other sizes.
    """
    found = []
    for seed in seeds:
        ground = Ground(folder / f"seed-{seed}", seed, pairs)
        ground.check()
        for name in rows:
            path = ground.folder / table / f"{slug(name)}.json"
            make = partial(_timed, TABLES[table].rows[name], ground)
            try:
                found.append(Measured(name, seed, kept(path, make, say, partial(_line, seed, name))))
            except HydraError as error:  # what a night may bring, such as a loss that is not finite
                say(f"seed {seed} {name} failed: {error}")
    return found


def _timed(row: Row, ground: Ground) -> Numbers:
    begun = time.perf_counter()
    found = row.make(ground)
    return {**found, "seconds": time.perf_counter() - begun}


def _line(seed: int, name: str, found: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if key != "seconds")
    return f"seed {seed} {name}: {numbers}; {found['seconds']:.0f} s"


def rows_table(kind: Kind, measured: Sequence[Measured]) -> Table:
    """Lay out means over seeds with standard errors, and the differences to the first row of each group, seed by seed."""
    title = "Mean over seeds ± standard error over seeds; differences are seed by seed"
    table = Table(title=title, title_justify="left")
    differences = [f"{kind.columns[key]} - first" for key in kind.compared]
    for name in ("row", "seeds", *kind.columns.values(), *differences):
        table.add_column(name)
    by_row: dict[str, dict[int, Numbers]] = {}
    for one in measured:
        by_row.setdefault(one.row, {})[one.seed] = one.numbers
    names = list(by_row)
    for number, name in enumerate(names):
        group, found = kind.rows[name].group, by_row[name]
        first = next(other for other, row in kind.rows.items() if row.group == group)
        against = {} if name == first else by_row.get(first, {})
        cells = [_spread([numbers[key] for numbers in found.values() if key in numbers]) for key in kind.columns]
        both = [(numbers, against[seed]) for seed, numbers in found.items() if seed in against]
        gaps = [_spread([numbers[key] - other[key] for numbers, other in both]) for key in kind.compared]
        last = number == len(names) - 1 or kind.rows[names[number + 1]].group != group
        table.add_row(name, str(len(found)), *cells, *gaps, end_section=last)
    return table


def _spread(values: Sequence[float]) -> str:
    return spread(values) if values else "-"


def main(arguments: Sequence[str]) -> None:
    """Run it from the command line; ends with 1 where a row failed or it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m hydra_ppo.profiling.learning.reward_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", choices=TABLES, required=True, help="Which rows.")
    parser.add_argument("--seeds", default="0,1,2", help="Seeds, such as 0,1,2.")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reward-models"), help="Keeps models and results of all tables."
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help="Pairs that SFT models are trained on; 4000 is affordable.")
    parser.add_argument("--rows", help="Names of some of the rows, parted by semicolons.")
    options = parser.parse_args(arguments)
    kind = TABLES[options.table]
    rows = options.rows.split(";") if options.rows else list(kind.rows)
    if unknown := [name for name in rows if name not in kind.rows]:
        raise SystemExit(str(ConfigError(f"rows={unknown[0]!r} is unknown; choose among {'; '.join(kind.rows)}.")))
    if options.pairs < 1:
        raise SystemExit(str(ConfigError(f"pairs={options.pairs} must be at least 1; choose for example 4000.")))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    say = partial(Console(stderr=True, highlight=False).print, markup=False, soft_wrap=True)  # a line stays one
    try:
        with redirect_stdout(sys.stderr):  # the commands that train say where they saved
            measured = measure_rows(options.output, options.table, rows, seeds, options.pairs, say)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    except (StopRequested, KeyboardInterrupt) as error:
        raise SystemExit("Stopped; the same command goes on.") from error
    print_table(Console(), rows_table(kind, measured))
    if failed := len(rows) * len(seeds) - len(measured):
        raise SystemExit(f"{failed} of {len(rows) * len(seeds)} failed; the same command tries them again.")


if __name__ == "__main__":
    main(sys.argv[1:])
