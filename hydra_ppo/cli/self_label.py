"""`hydra-ppo self-label`: heads label the pairs that they are sure of, in rounds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.aside import check_empty, whole_or_nothing
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from hydra_ppo.rewards.head_training import HeadTraining

BY = "labelled_by"
"""Column that says whose label a pair has: `data`, or `round N`."""


def self_label(
    folder: Path,
    output: Path,
    training: HeadTraining,
    *,
    held_out: float,
    labelled: float | None,
    rounds: int,
) -> dict[str, Any]:
    """Label the pairs of a folder of features that have no label, as far as heads are sure and held-out labels agree.

    Writes `pairs.jsonl` (labels of the data and those that were kept, better answer first), `held_out.jsonl`, `heads`, those of
    the last accepted round, and `rounds.json`.

    Args:
        folder: what hydra-ppo features wrote.
        output: folder to write.
        training: of the heads.
        held_out: share of the labels that judges the rounds.
        labelled: share of the labels to begin with, the others hidden and only used to say how many rounds got right; None
            begins with all.
        rounds: most rounds.

    Returns:
        What rounds.json says.

    Raises:
        ConfigError: where nothing is left to label, or nothing to begin with.
    """
    from hydra_ppo.rewards.features import GROUP, open_features
    from hydra_ppo.rewards.head_training import split_by_prompt
    from hydra_ppo.rewards.self_labels import self_label as run_rounds
    from hydra_ppo.rewards.stored_heads import write_heads

    check_empty("output", output)
    features = open_features(folder)
    groups, known = features.pairs[:, GROUP].tolist(), features.labelled()
    if not known:
        raise ConfigError(f"features={str(folder)!r} has no pair with a label, so there is nothing to begin with; label some.")
    seeds, hidden = known, list[int]()
    if labelled is not None:
        hidden, seeds = split_by_prompt(groups, known, labelled, training.seed + 1)
    pool = sorted({*range(len(features))} - {*seeds})
    if not pool:
        raise ConfigError(f"features={str(folder)!r} has a label for every pair; --labelled 0.15 begins with a share of them.")
    train, held = split_by_prompt(groups, seeds, held_out, training.seed)
    print(f"{len(train):,} labels to begin with, {len(held):,} held out, {len(pool):,} pairs without a label")
    found = run_rounds(features.states, train, held, pool, features.origin, training, rounds, print)
    right = [not other for row, (_, other) in found.labels.items() if row in {*hidden}]
    said: dict[str, Any] = {
        "seed_accuracy": found.seed.measured["accuracy"],
        "accuracy": found.heads.measured["accuracy"],
        "accuracy_se": found.seed.measured["accuracy_se"],
        "labelled": len(train),
        "held_out": len(held),
        "self_labelled": len(found.labels),
        "agreement": sum(right) / len(right) if right else None,
        "rounds": [asdict(made) for made in found.rounds],
    }
    rows = features.rows()
    own = ((rows[row], "data", False) for row in train)
    new = ((rows[row], f"round {number}", other) for row, (number, other) in sorted(found.labels.items()))
    with whole_or_nothing(output) as aside:
        _write(aside / "pairs.jsonl", (*own, *new))
        _write(aside / "held_out.jsonl", ((rows[row], "data", False) for row in held))
        write_heads(found.heads, aside / "heads")
        (aside / "rounds.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy {said['seed_accuracy']:.4f} from labels alone, {said['accuracy']:.4f} at the end")
    if right:
        print(f"{said['agreement']:.1%} of {len(right):,} labels agree with those that were hidden")
    print(f"Wrote {output}: {len(train) + len(found.labels):,} pairs, {len(found.labels):,} of them labelled by heads.")
    return said


def _write(path: Path, rows: Iterable[tuple[dict[str, Any], str, bool]]) -> None:
    """Write pairs, the better answer as chosen."""
    with path.open("w", encoding="utf-8") as file:
        for row, by, other in rows:
            given = {name: value for name, value in row.items() if name != "labelled"} | {BY: by}
            if other:
                given |= {"chosen": row["rejected"], "rejected": row["chosen"]}
            file.write(json.dumps(given, ensure_ascii=False) + "\n")
