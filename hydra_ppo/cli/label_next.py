"""`hydra-ppo label-next`: which pairs to have labelled next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.features import check_reward_role, describe, pair_states
from hydra_ppo.cli.opened import open_model, open_tokenizer
from hydra_ppo.cli.pairs import LABELLED, load_pairs
from hydra_ppo.cli.saved import check_file, run_config
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from hydra_ppo.model.origin import Origin

SHOWN = 5


def label_next(
    source: str,
    head: Path,
    count: int,
    *,
    output: Path | None = None,
    run: Path | None = None,
    flags: Sequence[str] = (),
    rows: int = 16,
) -> list[dict[str, Any]]:
    """Name the pairs without a label that teach a one-pass head most, the first to label first.

    Args:
        source: a folder of features, or a file or hub dataset of prompts with two responses.
        head: what hydra-ppo heads --kind one-pass wrote.
        count: pairs to name.
        output: JSONL to write.
        run: whose states are read, where source holds texts.
        flags: settings of the run to change.
        rows: most texts of one pass.

    Returns:
        What is written: prompt, the two responses, uncertainty, and the probability that the first is the better one.

    Raises:
        ConfigError: where the head is of another kind, or of states of another model.
    """
    from hydra_ppo.model.origin import check_origin
    from hydra_ppo.rewards.querying import pick_next
    from hydra_ppo.rewards.stored_heads import read_heads

    check_file("output", output)
    found = read_heads(head)
    if found.inverse is None:
        raise ConfigError(
            f"head={str(head)!r} holds {found.kind} heads, which know nothing of their uncertainty; train one with --kind "
            "one-pass."
        )
    if (local_path(source) / "features.json").is_file() or (local_path(source) / "progress.json").is_file():
        if run is not None or flags:
            raise ConfigError(f"--run and settings of a run do not go with stored states, source={source!r}; leave them out.")
        first, second, kept, origin = _stored(local_path(source))
    elif run is None:
        raise ConfigError(f"source={source!r} is no folder of features; name the run whose states are read with --run.")
    else:
        first, second, kept, origin = _of_texts(source, run, flags, rows)
    if not kept:
        raise ConfigError(f"source={source!r} has no pair without a label; give prompts with two responses each.")
    if (note := check_origin(found.origin, origin, f"head={str(head)!r}")) is not None:
        print(note)
    picks = pick_next((first - second) / found.scale, found.layers[0][0][0, 0], found.inverse, count)
    lines = [_line(kept[pick.row], pick.uncertainty, pick.p) for pick in picks]
    if output is not None:
        output.write_text("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), encoding="utf-8")
    for line in lines if output is None else lines[:SHOWN]:
        print(f"{line['uncertainty']:8.4f}  p {line['p_first']:.3f}  {json.dumps(line['prompt'], ensure_ascii=False)[:100]}")
    print(
        f"{len(lines):,} of {len(kept):,} pairs without a label, uncertainty {lines[0]['uncertainty']:.4f} down to "
        f"{lines[-1]['uncertainty']:.4f}" + ("" if output is None else f"; wrote {output}")
    )
    return lines


def _stored(folder: Path) -> tuple[Tensor, Tensor, list[dict[str, Any]], Origin]:
    from hydra_ppo.rewards.features import LABELLED as COLUMN
    from hydra_ppo.rewards.features import open_features, read_pairs

    features = open_features(folder)
    without = [i for i, labelled in enumerate(features.pairs[:, COLUMN].tolist()) if not labelled]
    first, second = read_pairs(features.states, without)
    rows = features.rows()
    return first, second, [rows[i] for i in without], features.origin


def _of_texts(source: str, run: Path, flags: Sequence[str], size: int) -> tuple[Tensor, Tensor, list[dict[str, Any]], Origin]:
    from hydra_ppo.model.origin import Origin

    check_reward_role(run)
    config = run_config(run, ["--data.train", source, *flags])
    tokenizer = open_tokenizer(run, config)
    pairs = load_pairs(source, tokenizer, config.data)
    for note in pairs.notes(source):
        print(note)
    both = zip(pairs.loaded.rows, pairs.rows, pairs.labelled(), strict=True)
    without = [(row, raw) for row, raw, labelled in both if not labelled]
    opened = open_model(run, config, tokenizer, ["reward"])
    (first, second), _ = pair_states(opened, [row for row, _ in without], size, False)
    origin = Origin(**describe(run, source, opened, pairs)["origin"])
    return first, second, [raw for _, raw in without], origin


def _line(row: dict[str, Any], uncertainty: float, p: float) -> dict[str, Any]:
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected", LABELLED)}
    return rest | {"responses": [row["chosen"], row["rejected"]], "uncertainty": uncertainty, "p_first": p}
