"""`hydra-ppo score`: what the reward head of a run says of given pairs or responses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.algorithms.reliability import pair_accuracy
from hydra_ppo.cli.opened import Opened, open_model, open_tokenizer
from hydra_ppo.cli.saved import check_file, check_saved, run_config
from hydra_ppo.data.columns import Columns
from hydra_ppo.data.responses import ResponseRow, has_responses, load_responses
from hydra_ppo.data.rows import Loaded, PreferenceRow, load_preferences
from hydra_ppo.data.sources import open_source
from hydra_ppo.errors import ConfigError

if TYPE_CHECKING:
    from hydra_ppo.config.settings import DataSettings


def score(run: Path, source: str, output: Path | None = None, *, flags: Sequence[str] = (), rows: int = 16) -> dict[str, Any]:
    """Score preference pairs, or prompts with responses, and print what came of it.

    Texts are encoded as in training, with the settings of the run, and read where PPO reads.

    Args:
        run: folder of a run, or a checkpoint.
        source: a file or a hub dataset, of pairs, or of rows with `prompt` and `response` or `responses`.
        output: JSONL to write, a line for each row that was used.
        flags: settings of the run to change, `--data.NAME VALUE` and `--model.NAME VALUE`.
        rows: most texts of one pass.

    Returns:
        The numbers that are printed.

    Raises:
        ConfigError: where the run has no reward head that was trained, or a setting is wrong.
        DataError: where no row can be used.
    """
    manifest = check_saved(run)
    if not manifest["reward_head_trained"]:
        raise ConfigError(
            f"run={str(run)!r} has a reward head that was never trained and says nothing; name a run of sft with reward_coef "
            "above 0, or a ppo run that began from one."
        )
    check_file("output", output)
    config = run_config(run, ["--data.train", source, *flags])
    tokenizer = open_tokenizer(run, config)
    # Data are read before the model, so that what is wrong with them is known at once.
    settings, are_pairs = _kind(config.data)
    if are_pairs:
        pairs = load_preferences(source, tokenizer, settings)
        opened = open_model(run, config, tokenizer, ["reward"])
        lines, numbers = _score_pairs(opened, pairs.rows, rows)
        notes = _notes(source, pairs)
    else:
        given = load_responses(source, tokenizer, settings)
        opened = open_model(run, config, tokenizer, ["reward"])
        lines, numbers = _score_responses(opened, given.rows, rows)
        notes = _notes(source, given)
    if output is not None:
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for note in notes:
        print(note)
    for name, value in numbers.items():
        print(f"{name:<24}{value:>12,.4f}" if isinstance(value, float) else f"{name:<24}{value:>12,}")
    if output is not None:
        print(f"Wrote {len(lines)} lines to {output}.")
    return numbers


def _kind(settings: DataSettings) -> tuple[DataSettings, bool]:
    """Return the settings that fit the first row, and whether it is a pair to compare."""
    columns = Columns(settings.columns, "preferences")
    _, raw = next(open_source(settings.train, settings.split).rows, (0, None))
    row = columns.rename(raw)
    if isinstance(row, dict) and row.get("chosen") is not None and row.get("rejected") is not None:
        return replace(settings, format="pairs"), True  # whatever form the run's own data had
    return settings, settings.format != "pairs" or not has_responses(row)


def _score_pairs(opened: Opened, rows: Sequence[PreferenceRow], size: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    prompts = [row.prompt_ids for row in rows] + [row.before_rejected for row in rows]
    scores = _scores(opened, prompts, [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows], size)
    chosen, rejected = scores[: len(rows)], scores[len(rows) :]
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    lines = [
        {
            "prompt": row.prompt_text,
            "chosen": row.chosen_text,
            "rejected": row.rejected_text,
            "chosen_score": a,
            "rejected_score": b,
            "margin": a - b,
        }
        for row, a, b in zip(rows, chosen, rejected, strict=True)
    ]
    numbers = {
        "pairs": len(rows),
        "accuracy": pair_accuracy(margins)[0],
        "ties": sum(margin == 0 for margin in margins),
        "mean margin": statistics.fmean(margins),
        "margin, std. deviation": statistics.pstdev(margins),
        "mean score of chosen": statistics.fmean(chosen),
        "mean score of rejected": statistics.fmean(rejected),
    }
    return lines, numbers


def _score_responses(opened: Opened, rows: Sequence[ResponseRow], size: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    prompts = [row.prompt_ids for row in rows for _ in row.ids]
    scores = _scores(opened, prompts, [ids for row in rows for ids in row.ids], size)
    rest = iter(scores)
    lines: list[dict[str, Any]] = []
    for row in rows:
        own = [next(rest) for _ in row.ids]
        answer = {"responses": list(row.texts), "scores": own} if row.is_list else {"response": row.texts[0], "score": own[0]}
        lines.append({"prompt": row.prompt_text, **answer})
    numbers = {
        "rows": len(rows),
        "responses": len(scores),
        "mean score": statistics.fmean(scores),
        "score, std. deviation": statistics.pstdev(scores),
        "lowest score": min(scores),
        "highest score": max(scores),
    }
    return lines, numbers


def _scores(opened: Opened, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], size: int) -> list[float]:
    from hydra_ppo.rollout.scoring import reward_scores

    return reward_scores(opened.model, prompts, responses, opened.ends, pad_id=opened.pad_id, rows=size)


def _notes(source: str, loaded: Loaded[Any]) -> Iterable[str]:
    """Say how many rows are used, and why others are left out or cut."""
    seen = len(loaded.rows) + loaded.skipped
    yield f"{source}: {len(loaded.rows)} of {seen} rows are used"
    yield from (f"{source}: {count} of {seen} rows: {reason}" for reason, count in loaded.reasons.items())
