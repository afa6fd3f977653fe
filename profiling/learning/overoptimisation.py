"""Does the alarm come in time? PPO on the quickstart's task without a KL penalty, its gold scorer as the evaluator.

The reward head is learned from pairs that the gold scorer labels, a tenth of them wrongly: a proxy, which PPO raises here
until it no longer means anything. The gold scorer judges held-out answers beside it (`eval_rewards`) and never enters training.

`python -m hydra_ppo.profiling.learning.overoptimisation --output DIR` trains, prints gold and proxy by step and what the
monitor said when, and draws gold and proxy over the root of the KL. What follows `--` are settings of ppo; `--start` is another
run of sft on the same data, such as one with several reward heads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.cli.flags import parse
from hydra_ppo.config.reading import as_values
from hydra_ppo.config.settings import KLSettings, OptimizerSettings, PPOConfig, RewardSource
from hydra_ppo.profiling.learning.shared import prepare_inputs, prepare_seed
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.quickstart.corpus import openings
from hydra_ppo.runs.plots import plot_run, read_alarms, read_metrics
from hydra_ppo.runtime.tables import print_table

TENTH = 0.1


@dataclass(frozen=True)
class Verdict:
    """What a run shows.

    Attributes:
        before, best: mean gold score of the held-out answers before training, and at its best evaluation.
        best_step: of that evaluation.
        lost_step: the first evaluation after it that is below by a tenth of the gain; None where there is none.
        alarms: steps at which over_optimisation was raised.
        alarm_step: the first of them from the best evaluation on; None where there is none.
        lost_share: of the gain, what gold had lost when that alarm was raised.
        early: those before the best evaluation: gold recovered after them.
    """

    before: float
    best: float
    best_step: int
    lost_step: int | None
    alarms: list[int]
    alarm_step: int | None
    lost_share: float | None
    early: list[int]


def verdict(records: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]) -> Verdict:
    """Hold the alarms of a run against its gold scores.

    Args:
        records: of `metrics.jsonl`, at least the evaluation before training.
        alarms: of `alarms.jsonl`.
    """
    gold = {record["step"]: record["eval/independent"] for record in records if record.get("eval/independent") is not None}
    before = gold[min(gold)]
    best_step = max(gold, key=lambda step: gold[step])
    best, gain = gold[best_step], gold[best_step] - before
    lost = [step for step in gold if step > best_step and gold[step] <= best - TENTH * gain]
    raised = [alarm["step"] for alarm in alarms if alarm.get("name") == "over_optimisation"]
    after = [step for step in raised if step >= best_step]
    return Verdict(
        before=before,
        best=best,
        best_step=best_step,
        lost_step=min(lost, default=None),
        alarms=raised,
        alarm_step=min(after, default=None),
        lost_share=(best - gold[min(after)]) / gain if after and gain > 0 else None,
        early=[step for step in raised if step < best_step],
    )


def over_optimise(
    folder: Path,
    seed: int = 0,
    *,
    name: str = "head",
    start: Path | None = None,
    copies: int = 1,
    flags: Sequence[str] = (),
) -> Verdict:
    """Train without a KL penalty and return what the monitor made of it; a run that is there already is only read.

    Args:
        folder: keeps data, the SFT run of a seed, and the runs by name.
        seed: of corpus, models, training and sampling.
        name: of the run.
        start: an sft run to start from; None is the quickstart's.
        copies: answers to each held-out prompt; the standard error of the gold score falls with its root.
        flags: settings of ppo that differ.
    """
    from hydra_ppo.cli import commands

    place = folder / f"seed-{seed}"
    config = settings(place, seed, name, start, copies, flags)
    output = Path(config.run.output)
    if not (output / "summary.json").is_file():
        if start is None:
            prepare_seed(place, "hydra", seed)
        else:
            prepare_inputs(place, seed)
        rows = [{"prompt": opening} for opening in openings()[1] for _ in range(copies)]
        held_out = Path(str(config.data.eval))
        held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        commands.ppo(config, resume=(output / "state.json").is_file())
    plot_run(output)
    found = verdict(read_metrics(output), read_alarms(output))
    (output / "verdict.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
    return found


def settings(place: Path, seed: int, name: str, start: Path | None, copies: int, flags: Sequence[str]) -> PPOConfig:
    """Return the quickstart's PPO without a KL penalty, longer, with all held-out prompts judged by the gold scorer."""
    config = quickstart.ppo_config(place, seed)
    config = replace(
        config,
        model=replace(config.model, name_or_path=str(start or place / "sft")),
        data=replace(config.data, eval=str(place / "data" / f"held_out-{copies}.jsonl")),
        run=replace(config.run, output=str(place / name), progress=False, memory="never", save_every=10),
        kl=KLSettings(coef=0.0),
        optimizer=OptimizerSettings(learning_rate=5e-4),
        steps=96,
        eval_every=2,
        eval_prompts=len(openings()[1]) * copies,
        eval_rewards=[RewardSource("function", "hydra_ppo.profiling.learning.gold:gold")],
    )
    found = parse(PPOConfig, "ppo", list(flags), as_values(config)).config
    assert found is not None
    return found


def table(records: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out proxy, gold and KL by evaluation, with the alarms since the one before."""
    shown = Table(title="Proxy and gold on held-out prompts", title_justify="left")
    for column in ("step", "proxy", "gold", "KL, nats", "root"):
        shown.add_column(column, justify="right")
    shown.add_column("alarms")
    waiting = sorted(alarms, key=lambda alarm: alarm["step"])
    for record in records:
        if record.get("eval/independent") is None:
            continue
        now = [alarm for alarm in waiting if alarm["step"] <= record["step"]]
        waiting = waiting[len(now) :]
        numbers = [record[f"eval/{name}"] for name in ("scores", "independent", "kl", "kl_sqrt")]
        said = ", ".join(f"{alarm['name']} ({alarm['step']})" for alarm in now)
        shown.add_row(str(record["step"]), *(f"{number:.2f}" for number in numbers), said)
    return shown


def main(arguments: Sequence[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m hydra_ppo.profiling.learning.overoptimisation", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="Folder for data, models and runs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="head", help="Of the run.")
    parser.add_argument("--start", type=Path, help="An sft run to start from.")
    parser.add_argument("--copies", type=int, default=1, help="Answers to each of the 366 held-out prompts.")
    parser.add_argument("settings", nargs="*", help="After --: settings of ppo, --NAME VALUE.")
    options = parser.parse_args(arguments)
    found = over_optimise(
        options.output, options.seed, name=options.name, start=options.start, copies=options.copies, flags=options.settings
    )
    output = options.output / f"seed-{options.seed}" / options.name
    console = Console()
    print_table(console, table(read_metrics(output), read_alarms(output)))
    for name, value in asdict(found).items():
        console.print(f"{name:<12} {value}", highlight=False)
    console.print(f"plots: {output / 'plots'}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
