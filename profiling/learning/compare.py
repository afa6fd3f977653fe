"""Does sharing cost quality? All five methods on the quickstart's task, judged by its gold scorer.

Methods that share a base (`j-hydra`, `hydra`) start from the joint SFT + reward model. Those with bases of their own start
as is usual: actor and reference from SFT alone, critic and reward from a reward model that was trained, alone, from that SFT
model; twice the training compute of the joint stage. All then run the same PPO settings on the same prompts and seeds and
are judged against the same opponent: the responses of the joint SFT policy to the held-out prompts.

The PPO settings are the quickstart's, which were chosen with `hydra`. `full` has a learning rate of its own, since one for
LoRA is far too high for whole weights.

Trunks (lowest layers without adapters, which run once per rollout) are compared for `hydra` alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.learning.shared import (
    SHARED_BASE,
    gold_scores,
    judged,
    kept,
    mean,
    opponent_scores,
    prepare_seed,
    spread,
)
from hydra_ppo.profiling.subjects.baselines import METHODS, build
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.quickstart.corpus import build_llama_config

FULL_LEARNING_RATE = 3e-4
"""The better of 1e-4 and 3e-4 by gold score on seed 3, which is not among those reported."""


@dataclass(frozen=True)
class Outcome:
    """One method with one trunk on one seed.

    Attributes:
        gold_before, gold_after: mean gold score of the held-out prompts under the policy that PPO started from, and after.
        gain_se: standard error of their difference, over prompts.
        win_rate: share of held-out prompts on which the trained policy beats the joint SFT policy; a tie is half a win.
        kl: nats per response to the method's own reference.
        reward_accuracy: held-out pair accuracy of the reward model that it trained against.
        seconds: of PPO and of judging it.
        trunk_layers: lowest decoder layers that have no adapters.
    """

    method: str
    seed: int
    gold_before: float
    gold_after: float
    gain_se: float
    win_rate: float
    kl: float
    reward_accuracy: float
    seconds: float
    trunk_layers: int = 0


def compare_learning(
    folder: Path,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    trunk_layers: Sequence[int] = (0,),
    full_learning_rate: float = FULL_LEARNING_RATE,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Train every method with every trunk and seed; what `folder` already holds is not run again.

    Args:
        folder: keeps data, models and one JSON file per method, trunk and seed.
        methods: of `baselines.METHODS`.
        seeds: of corpus, model, training and sampling.
        trunk_layers: numbers of lowest decoder layers that have no adapters; above 0 for `hydra` alone.
        full_learning_rate: peak learning rate of `full`.
        say: takes a line of progress per part.

    Raises:
        ConfigError: when a trunk does not go with a method or the model.
    """
    _check_trunks(methods, trunk_layers)
    outcomes = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        for method, trunk in product(methods, trunk_layers):
            path = place / f"{_label(method, trunk)}.json"
            make = partial(_train, place, method, seed, trunk, full_learning_rate)
            line = partial(_line, f"seed {seed} {_label(method, trunk)}", time.perf_counter())
            outcomes.append(Outcome(**kept(path, lambda make=make: asdict(make()), say, line)))
    return outcomes


def _line(name: str, started: float, found: Mapping[str, Any]) -> str:
    return (
        f"{name}: gold {found['gold_before']:.2f} -> {found['gold_after']:.2f}, win rate {found['win_rate']:.3f}, "
        f"KL {found['kl']:.1f}, {time.perf_counter() - started:.0f} s"
    )


def _label(method: str, trunk_layers: int) -> str:
    return f"{method}-trunk-{trunk_layers}" if trunk_layers else method


def _check_trunks(methods: Sequence[str], trunk_layers: Sequence[int]) -> None:
    """Raise ConfigError before anything is trained."""
    depth = build_llama_config(vocab_size=1).num_hidden_layers  # the vocabulary has no say in it
    for trunk in trunk_layers:
        if not 0 <= trunk < depth:
            raise ConfigError(
                f"trunk_layers={trunk} must be at least 0 and below the {depth} decoder layers of the quickstart's model; "
                "choose fewer."
            )
        for method in methods:
            if trunk and method != "hydra":
                raise ConfigError(
                    f"trunk_layers={trunk} is compared for the method 'hydra' alone, not for {method!r}; "
                    "use methods=hydra, or trunk_layers=0."
                )


def _train(place: Path, method: str, seed: int, trunk_layers: int, full_learning_rate: float) -> Outcome:
    from transformers import AutoTokenizer, set_seed

    from hydra_ppo.cli import loading
    from hydra_ppo.data.rows import load_prompts
    from hydra_ppo.model.hydra import HydraModel
    from hydra_ppo.training.ppo import PPOTrainer

    prepare_seed(place, method, seed)
    shared = method in SHARED_BASE
    config = quickstart.ppo_config(place, seed)
    if method == "full":
        config = replace(config, optimizer=replace(config.optimizer, learning_rate=full_learning_rate))
    tokenizer = AutoTokenizer.from_pretrained(place / "sft")
    prompts, eval_prompts, _ = loading.load_rows(load_prompts, tokenizer, config.data, seed)
    set_seed(seed)

    def load(stage: Any) -> HydraModel:
        own = "reward-alone" if {"critic", "reward"} & set(stage.roles) else "sft-alone"
        start = place / ("sft" if shared else own)
        return HydraModel.from_pretrained(start, lora=config.model.lora, train=stage, trunk_layers=trunk_layers)

    model = build(method, load)
    model.enable_checkpointing(config.model.gradient_checkpointing)
    trainer = PPOTrainer(model, tokenizer, config, prompts, eval_prompts)
    started = time.perf_counter()
    texts = [row.text for row in trainer.eval_prompts]
    before = gold_scores(model, tokenizer, texts, config.rollout, seed, "reference")
    opponent = opponent_scores(place, texts, seed)
    kl = trainer.train()["eval_kl"]
    after = gold_scores(model, tokenizer, texts, config.rollout, seed, "actor")
    reward_run = place / ("sft" if shared else "reward-alone")
    return Outcome(
        method=method,
        seed=seed,
        **judged(before, after, opponent),
        kl=kl,
        reward_accuracy=json.loads((reward_run / "summary.json").read_text())["eval/reward_accuracy"],
        seconds=time.perf_counter() - started,
        trunk_layers=trunk_layers,
    )


def learning_table(outcomes: Sequence[Outcome]) -> Table:
    """Lay out means over seeds with their standard errors."""
    table = Table(title="Learning: mean over seeds ± standard error over seeds", title_justify="left")
    columns = ("trunk layers", "seeds", "gold before", "gold after", "win rate", "KL, nats", "reward accuracy", "seconds")
    table.add_column("method")
    for name in columns:
        table.add_column(name, justify="right")
    for (method, trunk), rows in by_setting(outcomes).items():
        cells = [
            spread([getattr(row, name) for row in rows])
            for name in ("gold_before", "gold_after", "win_rate", "kl", "reward_accuracy")
        ]
        table.add_row(method, str(trunk), str(len(rows)), *cells, f"{mean([row.seconds for row in rows]):.0f}")
    return table


def by_setting(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], list[Outcome]]:
    """Group by method and trunk_layers, in the order of appearance; what is in a group differs in its seed."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.method, outcome.trunk_layers), []).append(outcome)
    return groups
