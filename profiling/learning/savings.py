"""Does saving memory cost quality? PPO on the quickstart's task with each saving that rounds, judged by its gold scorer.

All set-ups start from the same joint SFT + reward model of a seed, run the same PPO settings on the same prompts and are judged
against the same opponent, the responses of that SFT policy. `python -m hydra_ppo.profiling.learning.savings` prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.learning.compare import (
    gold_scores,
    judged,
    mean,
    opponent_scores,
    prepare_seed,
    spread,
    standard_error,
)
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.runtime.recorder import Silent

EMBEDDINGS = {"model": {"quantize_embeddings": "int8"}}
MOMENTS = {"optimizer": {"name": "adamw-8bit"}}
CACHE = {"rollout": {"kv_cache": "int8"}}

SETUPS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "defaults": {},
    "int8 embeddings": EMBEDDINGS,
    "8-bit AdamW": MOMENTS,
    "int8 KV cache": CACHE,
    "all three": {**EMBEDDINGS, **MOMENTS, **CACHE},
}
"""Settings by group that differ from the quickstart's."""

MARGIN = 0.15
"""How much lower a gold score may be and still count as no worse: about a seventh of what PPO gains on this task."""


@dataclass(frozen=True)
class Outcome:
    """One set-up on one seed.

    Attributes:
        gold_before, gold_after: mean gold score of the held-out prompts under the policy that PPO started from, and after.
        gain_se: standard error of their difference, over prompts.
        win_rate: share of held-out prompts on which the trained policy beats the SFT policy; a tie is half a win.
        kl: nats per response to the reference.
        drift: mean |difference| between the sampler's log-probs and those of a pass, nats a token; None where not measured.
        seconds: of PPO and of judging it.
    """

    setup: str
    seed: int
    gold_before: float
    gold_after: float
    gain_se: float
    win_rate: float
    kl: float
    drift: float | None
    seconds: float


class Drifts(Silent):
    """Keeps the drift of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def log(self, step: int, metrics: Any) -> None:
        if metrics.get("rollout/drift") is not None:
            self.found.append(metrics["rollout/drift"])


def with_settings(config: PPOConfig, changes: Mapping[str, Mapping[str, Any]]) -> PPOConfig:
    """Return a config with some settings changed, by group."""
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in changes.items()})


def compare_savings(
    folder: Path, setups: Sequence[str], seeds: Sequence[int], say: Callable[[str], None] = print
) -> list[Outcome]:
    """Train with every set-up and seed; what `folder` already holds is not run again.

    Args:
        folder: keeps data, models and one JSON file per set-up and seed.
        setups: of `SETUPS`.
        seeds: of corpus, model, training and sampling.
        say: takes a line of progress per part.
    """
    outcomes = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        prepare_seed(place, "hydra", seed)
        for setup in setups:
            path = place / f"{setup.replace(' ', '-')}.json"
            if not path.is_file():
                found = _train(place, setup, seed)
                path.write_text(json.dumps(asdict(found)) + "\n")
                say(
                    f"seed {seed} {setup}: gold {found.gold_before:.2f} -> {found.gold_after:.2f}, win rate "
                    f"{found.win_rate:.3f}, KL {found.kl:.1f}, {found.seconds:.0f} s"
                )
            outcomes.append(Outcome(**json.loads(path.read_text())))
    return outcomes


def _train(place: Path, setup: str, seed: int) -> Outcome:
    from transformers import AutoTokenizer, set_seed

    from hydra_ppo.cli import loading
    from hydra_ppo.data.rows import load_prompts
    from hydra_ppo.training.ppo import PPOTrainer

    config = with_settings(quickstart.ppo_config(place, seed), SETUPS[setup])
    tokenizer = AutoTokenizer.from_pretrained(place / "sft")
    prompts, eval_prompts, _ = loading.load_rows(load_prompts, tokenizer, config.data, seed)
    set_seed(seed)
    model = loading.load_model(config.model, "ppo")
    drifts = Drifts()
    trainer = PPOTrainer(model, tokenizer, config, prompts, eval_prompts, run=drifts)
    started = time.perf_counter()
    texts = [row.text for row in trainer.eval_prompts]
    exact = quickstart.ppo_config(place, seed).rollout  # all are judged by the exact cache
    before = gold_scores(model, tokenizer, texts, exact, seed, "reference")
    kl = trainer.train()["eval_kl"]
    after = gold_scores(model, tokenizer, texts, exact, seed, "actor")
    return Outcome(
        setup=setup,
        seed=seed,
        **judged(before, after, opponent_scores(place, texts, seed)),
        kl=kl,
        drift=mean(drifts.found) if drifts.found else None,
        seconds=time.perf_counter() - started,
    )


def savings_table(outcomes: Sequence[Outcome]) -> Table:
    """Lay out means over seeds with standard errors, and the difference to the defaults seed by seed."""
    table = Table(title="Savings: mean over seeds ± standard error over seeds", title_justify="left")
    for name in ("set-up", "seeds", "gold after", "win rate", "KL, nats", "drift, nats", "gold - defaults", "no worse"):
        table.add_column(name)
    plain = {row.seed: row.gold_after for row in outcomes if row.setup == "defaults"}
    for setup in dict.fromkeys(row.setup for row in outcomes):
        rows = [row for row in outcomes if row.setup == setup]
        cells = [spread([getattr(row, name) for row in rows]) for name in ("gold_after", "win_rate", "kl")]
        drift = [row.drift for row in rows if row.drift is not None]
        gaps = [row.gold_after - plain[row.seed] for row in rows if row.seed in plain]
        compared = setup != "defaults" and len(gaps) > 1
        table.add_row(
            setup,
            str(len(rows)),
            *cells,
            f"{mean(drift):.4f}" if drift else "-",
            spread(gaps) if compared else "-",
            ("yes" if no_worse(gaps) else "not shown") if compared else "-",
        )
    return table


def no_worse(gaps: Sequence[float], margin: float = MARGIN) -> bool:
    """Return whether differences to the defaults, seed by seed, show a loss below `margin`: the mean less two standard errors
    is above it."""
    found = mean(gaps) - 2 * standard_error(gaps)
    return math.isfinite(found) and found > -margin


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("runs/savings"), help="Keeps models and results.")
    parser.add_argument("--seeds", default="0,1,2", help="Seeds, such as 0,1,2.")
    parser.add_argument("--setups", default=",".join(SETUPS), help="Names of set-ups.")
    options = parser.parse_args()
    setups = options.setups.split(",")
    if unknown := [name for name in setups if name not in SETUPS]:
        raise SystemExit(str(ConfigError(f"setups={unknown[0]!r} is unknown; choose among {', '.join(SETUPS)}.")))
    say = Console(stderr=True, highlight=False).print
    outcomes = compare_savings(options.output, setups, [int(seed) for seed in options.seeds.split(",")], say)
    Console(width=140).print(savings_table(outcomes))


if __name__ == "__main__":
    main()
