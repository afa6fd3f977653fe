"""What do settings of PPO do to learning? Set-ups on the quickstart's task, judged by its gold scorer.

All set-ups start from the same joint SFT + reward model of a seed, run the same prompts and are judged against the same
opponent, the responses of that SFT policy. `python -m hydra_ppo.profiling.learning.setups --table methods` prints a table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.learning.shared import (
    gold_scores,
    judged,
    kept,
    mean,
    opponent_scores,
    prepare_seed,
    spread,
    standard_error,
)
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.runtime.recorder import Silent
from hydra_ppo.runtime.tables import print_table

if TYPE_CHECKING:
    from hydra_ppo.model.hydra import HydraModel

EMBEDDINGS = {"model": {"quantize_embeddings": "int8"}}
MOMENTS = {"optimizer": {"name": "adamw-8bit"}}
CACHE = {"rollout": {"kv_cache": "int8"}}
COPIES = {"rollout": {"weights": "merged-bf16"}}
BF16 = {"model": {"dtype": "bf16"}}
IN_LOSS = {"kl": {"estimator": "k3", "place": "loss"}}
EIGHT = {"rollout": {"samples_per_prompt": 8}}

PRACTICE = "practice"
"""Stands for the first `PRACTISED` of the pairs that the SFT model was tuned on."""
PRACTISED = 2000

Setup = Mapping[str, Any]
"""Settings that differ from the quickstart's, those of a group as a mapping of their own."""

TABLES: dict[str, dict[str, Setup]] = {
    "savings": {
        "defaults": {},
        "int8 embeddings": EMBEDDINGS,
        "8-bit AdamW": MOMENTS,
        "int8 KV cache": CACHE,
        "all three": {**EMBEDDINGS, **MOMENTS, **CACHE},
    },
    "speed": {
        "defaults": {},
        "merged copies": COPIES,
        "bf16": BF16,
        "bf16, merged copies": {**BF16, **COPIES},
    },
    "methods": {
        "defaults": {},
        "group": {"advantage": "group", **EIGHT},
        "group, no std": {"advantage": "group", "group_std": False, **EIGHT},
        "GRPOVI reference": {"advantage": "group", "group_std": False, "variance_increase": "reference", **EIGHT},
        "GRPOVI length": {"advantage": "group", "group_std": False, "variance_increase": "length", **EIGHT},
        "rloo": {"advantage": "rloo", **EIGHT},
        "reinforce": {"advantage": "reinforce"},
        "kl none": {"kl": {"estimator": "none"}},
        "kl js": {"kl": {"estimator": "js"}},
        "kl k3 in the loss": IN_LOSS,
        "ema": {"ema_decay": 0.97},
        "critic Monte Carlo": {"critic_lambda": 1.0, "critic_warmup_steps": 4},
        "actor lambda by length": {"actor_lambda": "length", "lambda_alpha": 0.4, "critic_lambda": 1.0},
        "2 critic updates": {"critic_updates_per_actor": 2},
        "bounded critic": {"value_range": [-8.0, 8.0], "reward": {"score_clip": 8.0}, **IN_LOSS},
        "clip 0.2 to 0.28": {"clip_range_high": 0.28},
        "ptx": {"ptx": {"data": PRACTICE, "coef": 0.3}},
        "rehearsal": {"rehearsal": {"data": PRACTICE}},
    },
}
"""Set-ups by table; each of a table's but the defaults is compared with those."""

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
        perplexity: of the actor on the held-out chosen answers, per token: what it has forgotten of what it was tuned on.
        gold_ema: of the running mean of the actor; None where there is none.
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
    perplexity: float
    gold_ema: float | None
    seconds: float


class Drifts(Silent):
    """Keeps the drift of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def log(self, step: int, metrics: Any) -> None:
        if metrics.get("rollout/drift") is not None:
            self.found.append(metrics["rollout/drift"])


def with_settings(config: PPOConfig, changes: Setup) -> PPOConfig:
    """Return a config with some settings changed."""
    groups = {name: replace(getattr(config, name), **values) for name, values in changes.items() if isinstance(values, Mapping)}
    return replace(config, **{**changes, **groups})


def compare_setups(
    folder: Path, table: str, setups: Sequence[str], seeds: Sequence[int], say: Callable[[str], None] = print
) -> list[Outcome]:
    """Train with every set-up and seed; what `folder` already holds is not run again.

    Args:
        folder: keeps data, models and one JSON file per set-up and seed.
        table: of `TABLES`.
        setups: of that table.
        seeds: of corpus, model, training and sampling.
        say: takes a line of progress per part.
    """
    outcomes = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        prepare_seed(place, "hydra", seed)
        for setup in setups:
            path = place / f"{setup.replace(' ', '-')}.json"
            make = partial(train, place, setup, TABLES[table][setup], seed)
            line = partial(_line, f"seed {seed} {setup}")
            outcomes.append(Outcome(**kept(path, lambda make=make: asdict(make()), say, line)))
    return outcomes


def _line(name: str, found: Mapping[str, Any]) -> str:
    return (
        f"{name}: gold {found['gold_before']:.2f} -> {found['gold_after']:.2f}, win rate {found['win_rate']:.3f}, "
        f"KL {found['kl']:.1f}, perplexity {found['perplexity']:.2f}, {found['seconds']:.0f} s"
    )


def train(place: Path, setup: str, changes: Setup, seed: int) -> Outcome:
    """Run PPO with some settings changed, and judge it against the answers of the SFT policy in `place`.

    Args:
        place: folder of a seed, which holds the data and `sft`.
        setup: name of the outcome.
        changes: settings that differ; `model.name_or_path` is another run of sft to start from.
        seed: of training and sampling.
    """
    from transformers import AutoTokenizer, set_seed

    from hydra_ppo.cli import loading
    from hydra_ppo.data.rows import load_prompts
    from hydra_ppo.training.ppo import PPOTrainer

    config = with_settings(quickstart.ppo_config(place, seed), changes)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    practised = _practised(config, tokenizer, place, seed)
    prompts, eval_prompts, _ = loading.load_rows(load_prompts, tokenizer, config.data, seed)
    set_seed(seed)
    model = loading.load_model(config.model, config.stage)
    drifts = Drifts()
    trainer = PPOTrainer(model, tokenizer, config, prompts, eval_prompts, run=drifts, **practised)
    started = time.perf_counter()
    texts = [row.text for row in trainer.eval_prompts]
    exact = quickstart.ppo_config(place, seed).rollout  # all are judged by the exact cache
    before = gold_scores(model, tokenizer, texts, exact, seed, "reference")
    kl = trainer.train()["eval_kl"]
    after = gold_scores(model, tokenizer, texts, exact, seed, "actor")
    ema = gold_scores(model, tokenizer, texts, exact, seed, "actor_ema") if config.ema_decay is not None else None
    return Outcome(
        setup=setup,
        seed=seed,
        **judged(before, after, opponent_scores(place, texts, seed)),
        kl=kl,
        drift=mean(drifts.found) if drifts.found else None,
        perplexity=_perplexity(model, tokenizer, place, seed),
        gold_ema=None if ema is None else mean(ema),
        seconds=time.perf_counter() - started,
    )


def _practised(config: PPOConfig, tokenizer: Any, place: Path, seed: int) -> dict[str, Any]:
    """Return the rows that the actor practises, by kind."""
    from hydra_ppo.data.rows import load_preferences

    kinds = [kind for kind in ("ptx", "rehearsal") if getattr(config, kind).data == PRACTICE]
    if not kinds:
        return {}
    data = quickstart.sft_config(place, seed).data
    rows = load_preferences(data.train, tokenizer, data).rows[:PRACTISED]
    return dict.fromkeys(kinds, rows)


def _perplexity(model: HydraModel, tokenizer: Any, place: Path, seed: int) -> float:
    """Return the actor's perplexity, per token, on the held-out chosen answers of what it was tuned on."""
    import torch

    from hydra_ppo.data.rows import load_preferences
    from hydra_ppo.experience import Experience

    data = quickstart.sft_config(place, seed).data
    assert data.eval is not None
    rows = load_preferences(data.eval, tokenizer, data).rows
    prompts, answers = [row.prompt_ids for row in rows], [row.chosen_ids for row in rows]
    experience = Experience.from_lists(prompts, answers, 0, model.device)
    total = 0.0
    with torch.no_grad(), model.role("actor"):
        for group in experience.split(32):
            sequences = experience.select(group).sequences()
            total -= model.logprobs(sequences).logprobs[sequences.response_mask].sum().item()
    return math.exp(total / sum(len(answer) for answer in answers))


def setups_table(outcomes: Sequence[Outcome]) -> Table:
    """Lay out means over seeds with standard errors, and the difference to the defaults seed by seed."""
    table = Table(title="Mean over seeds ± standard error over seeds", title_justify="left")
    names = ("gold after", "win rate", "KL, nats", "perplexity", "gold of EMA", "drift, nats", "gold - defaults", "no worse")
    for name in ("set-up", "seeds", *names):
        table.add_column(name)
    plain = {row.seed: row.gold_after for row in outcomes if row.setup == "defaults"}
    for setup in dict.fromkeys(row.setup for row in outcomes):
        rows = [row for row in outcomes if row.setup == setup]
        cells = [spread([getattr(row, name) for row in rows]) for name in ("gold_after", "win_rate", "kl", "perplexity")]
        drift = [row.drift for row in rows if row.drift is not None]
        ema = [row.gold_ema for row in rows if row.gold_ema is not None]
        gaps = [row.gold_after - plain[row.seed] for row in rows if row.seed in plain]
        compared = setup != "defaults" and len(gaps) > 1
        table.add_row(
            setup,
            str(len(rows)),
            *cells,
            spread(ema) if ema else "-",
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
    parser.add_argument("--table", choices=TABLES, required=True, help="Which set-ups.")
    parser.add_argument("--output", type=Path, help="Keeps models and results; default runs/TABLE.")
    parser.add_argument("--seeds", default="0,1,2", help="Seeds, such as 0,1,2.")
    parser.add_argument("--setups", help="Names of some of them, parted by semicolons.")
    options = parser.parse_args()
    known = TABLES[options.table]
    setups = options.setups.split(";") if options.setups else list(known)
    if unknown := [name for name in setups if name not in known]:
        raise SystemExit(str(ConfigError(f"setups={unknown[0]!r} is unknown; choose among {'; '.join(known)}.")))
    say = partial(Console(stderr=True, highlight=False).print, markup=False, soft_wrap=True)  # a line stays one
    folder = options.output or Path("runs") / options.table
    outcomes = compare_setups(folder, options.table, setups, [int(seed) for seed in options.seeds.split(",")], say)
    print_table(Console(), setups_table(outcomes))


if __name__ == "__main__":
    main()
