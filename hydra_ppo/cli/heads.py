"""`hydra-ppo heads`: reward heads on stored states, trained on a CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.aside import check_empty
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from hydra_ppo.rewards.head_training import HeadTraining


def heads(folder: Path, output: Path, training: HeadTraining, held_out: float) -> dict[str, Any]:
    """Train heads on the labelled pairs of a folder of features, and print what held-out pairs say of them.

    Args:
        folder: what hydra-ppo features wrote.
        output: folder to write, which `reward.sources: [{kind: head, target: ...}]` names.
        training: how.
        held_out: share of the pairs, by prompts, that the heads never see.

    Returns:
        What is printed.

    Raises:
        ConfigError: where the folder is not whole, or too few pairs have a label.
    """
    from hydra_ppo.rewards.features import GROUP, open_features
    from hydra_ppo.rewards.head_training import LabelledPairs, split_by_prompt, train_heads
    from hydra_ppo.rewards.stored_heads import write_heads

    check_empty("output", output)
    features = open_features(folder)
    rows = features.labelled()
    if not rows:
        raise ConfigError(f"features={str(folder)!r} has no pair with a label; give some, or hydra-ppo label-next names them.")
    train, held = split_by_prompt(features.pairs[:, GROUP].tolist(), rows, held_out, training.seed)
    print(f"{len(train):,} pairs to train on, {len(held):,} held out, of {len(features):,} stored")
    begun = time.monotonic()
    found = train_heads(LabelledPairs(features.states), train, held, features.origin, training, print)
    write_heads(found, output)
    for line in in_words(found.measured):
        print(line)
    print(f"Wrote {output} in {time.monotonic() - begun:,.1f} s; reward.sources: [{{kind: head, target: {output}}}] reads it.")
    return found.measured


def in_words(measured: dict[str, Any]) -> list[str]:
    """Return lines on held-out pairs."""
    lines = [
        f"{'held-out accuracy':<24}{measured['accuracy']:>12.4f} +- {measured['accuracy_se']:.4f}",
        f"{'of each member':<24}{', '.join(f'{value:.4f}' for value in measured['accuracies']):>12}",
        f"{'calibration error':<24}{measured['ece']:>12.4f}",
        f"{'loss, nats':<24}{measured['loss']:>12.4f}",
        f"{'spread of members':<24}{measured['spread']:>12.4f}",
    ]
    if "ridges" in measured:
        lines.append(f"{'ridges':<24}{', '.join(f'{value:g}' for value in measured['ridges']):>12}")
    if "ridge" in measured:
        lines += [f"{'ridge':<24}{measured['ridge']:>12g}", f"{'loss before each pair':<24}{measured['online_loss']:>12.4f}"]
    return lines
