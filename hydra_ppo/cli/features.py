"""`hydra-ppo features`: the states that reward heads read, of every pair, once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.opened import Opened, open_model, open_tokenizer
from hydra_ppo.cli.pairs import Pairs, load_pairs
from hydra_ppo.cli.saved import check_saved, run_config
from hydra_ppo.data.rows import PreferenceRow, prompt_key
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import rows_digest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EVERY = 10.0
"""Seconds between two lines on how far it is."""


def features(
    run: Path, source: str, output: Path, *, flags: Sequence[str] = (), rows: int = 16, means: bool = False
) -> dict[str, Any]:
    """Store the reward role's final states at the last token of both answers of every pair.

    They are read where the reward head reads, in fp16. A call that was stopped is gone on with by the same call.

    Args:
        run: folder of a run, or a checkpoint.
        source: a file or a hub dataset of pairs.
        output: folder to write.
        flags: settings of the run to change, `--data.NAME VALUE` and `--model.NAME VALUE`.
        rows: most texts of one pass.
        means: whether to store the mean over each answer's tokens too.

    Returns:
        What features.json says.

    Raises:
        ConfigError: where the run has no reward role, or the folder holds something else.
        DataError: where no row can be used.
    """
    from hydra_ppo.rewards.features import FeatureWriter, check_output

    check_reward_role(run)
    check_output(output)
    config = run_config(run, ["--data.train", source, *flags])
    tokenizer = open_tokenizer(run, config)
    pairs = load_pairs(source, tokenizer, config.data)
    opened = open_model(run, config, tokenizer, ["reward"])
    about = describe(run, source, opened, pairs)
    identity = {"origin": about["origin"], "data": about["data"], "labelled": sum(pairs.labelled()), "means": means}
    hidden = about["origin"]["hidden_size"]
    writer = FeatureWriter(output, identity, pair_table(pairs), pairs.rows, hidden, means)
    for note in pairs.notes(source):
        print(note)
    if writer.done:
        print(f"{output} has {writer.done:,} of {writer.count:,} pairs already.")
    begun, first, said = time.monotonic(), writer.done, time.monotonic()
    block = 4 * rows
    while writer.done < writer.count:
        part = pairs.loaded.rows[writer.done : writer.done + block]
        writer.add(*pair_states(opened, part, rows, means))
        if (now := time.monotonic()) - said >= EVERY:
            said, rate = now, (writer.done - first) / (now - begun)
            left = (writer.count - writer.done) / rate
            print(f"{writer.done:,} of {writer.count:,} pairs, {rate:.1f} a second, {left:,.0f} s to go", flush=True)
    writer.finish(about)
    seconds, size = time.monotonic() - begun, sum(path.stat().st_size for path in output.iterdir())
    print(
        f"Wrote {output}: {writer.count:,} pairs, {hidden} numbers of each answer{' twice' if means else ''}, "
        f"{size / 2**20:,.1f} MiB, in {seconds:,.1f} s."
    )
    return about


def check_reward_role(run: Path) -> None:
    """Refuse a run without a reward role.

    Raises:
        ConfigError: naming it.
    """
    if "reward" not in check_saved(run)["roles"]:
        raise ConfigError(f"run={str(run)!r} has no reward role, whose states are stored; name a run of sft or ppo.")


def describe(run: Path, source: str, opened: Opened, pairs: Pairs) -> dict[str, Any]:
    """Return what features.json says of where states come from."""
    from hydra_ppo.model.origin import origin_of

    return {
        "run": str(run),
        "source": source,
        "adapter": opened.model.roles["reward"].adapter,
        "end": opened.tokenizer.convert_ids_to_tokens(opened.ends[0]),
        "data": rows_digest(pairs.loaded.rows),
        "origin": origin_of(opened.model, opened.ends[0]).as_values(),
    }


def pair_table(pairs: Pairs) -> np.ndarray:
    """Return (N, 4) int32 what is kept of each pair beside its states; see `rewards.features`."""
    import numpy as np

    numbers: dict[Any, int] = {}
    groups = [numbers.setdefault(prompt_key(row), len(numbers)) for row in pairs.loaded.rows]
    lengths = [(len(row.chosen_ids), len(row.rejected_ids)) for row in pairs.loaded.rows]
    both = zip(groups, lengths, pairs.labelled(), strict=True)
    return np.array([(group, *own, labelled) for group, own, labelled in both], dtype=np.int32)


def pair_states(
    opened: Opened, part: Sequence[PreferenceRow], rows: int, means: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Return the states (n, H) of chosen and rejected answers, and their means where those are asked for."""
    from hydra_ppo.rollout.scoring import answer_states

    prompts = [row.prompt_ids for row in part] + [row.before_rejected for row in part]
    answers = [row.chosen_ids for row in part] + [row.rejected_ids for row in part]
    options: dict[str, Any] = {"pad_id": opened.pad_id, "rows": rows, "means": means}
    ends, mean = answer_states(opened.model, prompts, answers, opened.ends, **options)
    count = len(part)
    return (ends[:count], ends[count:]), None if mean is None else (mean[:count], mean[count:])
