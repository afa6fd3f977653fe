"""Rows on reward models: ensembles in PPO, losses, and floor pairs over the number of labels."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from hydra_ppo.config.settings import RewardSource
from hydra_ppo.profiling.learning import setups
from hydra_ppo.profiling.learning.reward_ground import LABELS, NO_LABELS, Ground, Numbers, Row, head_numbers, slug, summary
from hydra_ppo.profiling.learning.shared import train_sft

NOISE = 0.25
"""Share of wrong labels under ensembles and losses, as of Coste et al. 2023 (arXiv 2310.02743)."""
HEADS = 5
LCB, VARIANCE = 1.0, 0.5
"""Coefficients: mean less one deviation; of the variance the larger one of Coste et al., since members share a base here."""

AGGREGATES: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "one head": (1, {}),
    "5 heads, mean": (HEADS, {}),
    "5 heads, minimum": (HEADS, {"aggregate": "minimum"}),
    "5 heads, lcb": (HEADS, {"aggregate": "lcb", "aggregate_coef": LCB}),
    "5 heads, variance": (HEADS, {"aggregate": "variance", "aggregate_coef": VARIANCE}),
}

FLOOR_NOISE = 0.1
"""Share of wrong labels under floor pairs and heads: the quickstart's own."""
COUNTS = (64, 256, 1000, 4000)
PASSES = 8
"""Most passes over few labels."""
FLOORS: Mapping[str, Mapping[str, Any]] = {
    "no floor": {},
    "floor 0.125": {"floor_share": 0.125},
    "random tokens": {"floor_share": 0.125, "floor_kinds": ["random-tokens"]},
}


def ensembles() -> dict[str, Row]:
    """Return rows of one head and of five with each aggregate, on one joint SFT run for each number of heads."""
    return {name: Row("ensembles", partial(_ensemble, name, *how)) for name, how in AGGREGATES.items()}


def _ensemble(name: str, heads: int, how: Mapping[str, Any], ground: Ground) -> Numbers:
    run = ground.joint(NOISE)  # whose answers are the opponent of all
    if heads > 1:
        run = ground.joint(NOISE, f"sft-{heads}", reward_heads=heads)
    source = RewardSource("head", **how)
    found = head_numbers(
        run, ground.held_out(NOISE), seed=ground.seed, noise=NOISE, aggregate=source.aggregate, coef=source.aggregate_coef
    )
    changes = {"model": {"name_or_path": str(run)}, "reward": {"sources": [source]}}
    learned = setups.train(ground.place(NOISE), name, changes, ground.seed)
    return found | {key: getattr(learned, key) for key in ("gold_before", "gold_after", "win_rate", "kl")}


def losses() -> dict[str, Row]:
    """Return rows of joint SFT with each loss of the reward model; the first run is that of `ensembles`."""
    return {loss: Row("losses", partial(_loss, loss)) for loss in ("bradley-terry", "advantage", "divergent")}


def _loss(loss: str, ground: Ground) -> Numbers:
    run = ground.joint(NOISE) if loss == "bradley-terry" else ground.joint(NOISE, f"sft-{loss}", reward_loss=loss)
    found = head_numbers(run, ground.held_out(NOISE), seed=ground.seed, noise=NOISE)
    return found | {"perplexity": summary(run)["eval/perplexity"]}


def floor() -> dict[str, Row]:
    """Return rows of reward models alone, trained on few labels with and without floor pairs, and with the control."""
    return {
        f"{count} labels, {name}": Row(f"{count} labels", partial(_floor, count, name)) for count in COUNTS for name in FLOORS
    }


def passes(count: int) -> int:
    """Return how often each label is seen: `LABELS` pairs in all, but no label more than `PASSES` times."""
    return max(1, min(PASSES, LABELS // count))


def _floor(count: int, floor: str, ground: Ground) -> Numbers:
    start, labels = ground.language_model(), ground.labels(count, FLOOR_NOISE)
    config = ground.settings(NO_LABELS, sft_coef=0.0, epochs=passes(count), **FLOORS[floor])
    model, data = replace(config.model, name_or_path=str(start)), replace(config.data, train=str(labels))
    run = train_sft(replace(config, model=model, data=data), ground.folder / f"reward-{count}-{slug(floor)}")
    found = head_numbers(run, ground.held_out(NO_LABELS), seed=ground.seed)
    shutil.rmtree(run)
    return {name: found[name] for name in ("accuracy", "ece", "score_sd")}
