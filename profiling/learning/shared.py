"""What the comparisons share: what a seed starts from, results that are kept, gold scores, and numbers over seeds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.quickstart.corpus import Corpus, gold_score
from hydra_ppo.runtime.files import write_whole

SHARED_BASE = ("j-hydra", "hydra")


def kept(
    path: Path, make: Callable[[], Mapping[str, Any]], say: Callable[[str], None], line: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any]:
    """Return the result that a file keeps; where there is none, make it, keep it, and say a line on it.

    Args:
        path: JSON; it is written in one move, so that a run that is killed leaves a whole one or none.
        make: makes the result, plain values.
        say: takes the line.
        line: what is said of a result.
    """
    if not path.is_file():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found) + "\n")
        say(line(found))
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def prepare_inputs(place: Path, seed: int, corpus: Callable[[], Corpus] | None = None) -> None:
    """Write data and base of a seed, where the base, which comes last, is not there yet.

    Args:
        place: folder of the seed.
        seed: of corpus and base.
        corpus: makes another corpus than the quickstart's.
    """
    if (place / "base").is_dir():
        return
    aside = place / "inputs.partial"
    for left in (aside, place / "data"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    quickstart.write_inputs(aside, seed, None if corpus is None else corpus())
    for name in ("data", "base"):
        (aside / name).replace(place / name)
    aside.rmdir()


def train_sft(config: SFTConfig, output: Path) -> Path:
    """Run sft into a folder, quietly, and return it; one that is done is left, one that was killed begun anew."""
    from hydra_ppo.cli import commands

    if not (output / "summary.json").is_file():
        commands.sft(replace(config, run=replace(config.run, output=str(output), progress=False, overwrite=True)))
    return output


def prepare_seed(place: Path, method: str, seed: int) -> None:
    """Write data and base of a seed, and train what `method` starts from, where that is not there yet."""
    prepare_inputs(place, seed)
    joint = quickstart.sft_config(place, seed)
    train_sft(joint, place / "sft")
    if method not in SHARED_BASE:
        alone = train_sft(replace(joint, reward_coef=0.0), place / "sft-alone")
        start = replace(joint.model, name_or_path=str(alone))
        train_sft(replace(joint, model=start, sft_coef=0.0), place / "reward-alone")


def judged(before: Sequence[float], after: Sequence[float], opponent: Sequence[float]) -> dict[str, float]:
    """Return gold_before, gold_after, gain_se and win_rate of an outcome.

    Args:
        before, after: gold scores of the answers to held-out prompts before and after PPO.
        opponent: of the answers that it is compared with.
    """
    return {
        "gold_before": mean(before),
        "gold_after": mean(after),
        "gain_se": standard_error([b - a for a, b in zip(before, after, strict=True)]),
        "win_rate": mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(after, opponent, strict=True)]),
    }


def opponent_scores(place: Path, prompts: Sequence[str], seed: int) -> list[float]:
    """Return the gold scores of what the joint SFT policy answers to held-out prompts."""
    from transformers import AutoTokenizer

    from hydra_ppo.model.hydra import HydraModel

    path = place / "opponent.json"
    if not path.is_file():
        model = HydraModel.from_pretrained(place / "sft")
        tokenizer = AutoTokenizer.from_pretrained(place / "sft")
        rollout = quickstart.ppo_config(place, seed).rollout
        write_whole(path, json.dumps(gold_scores(model, tokenizer, prompts, rollout, seed, "reference")))
    found: list[float] = json.loads(path.read_text())
    return found


def gold_scores(model: Any, tokenizer: Any, prompts: Sequence[str], rollout: Any, seed: int, role: str) -> list[float]:
    """Return the gold scores of what a role answers to held-out prompts."""
    texts = quickstart.sample_texts(model, tokenizer, prompts, rollout, seed, role)
    return [gold_score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Write a mean with its standard error, without one for a single value."""
    middle = f"{mean(values):.3f}"
    return middle if len(values) < 2 else f"{middle} ± {standard_error(values):.3f}"


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
