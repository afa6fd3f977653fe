"""`hydra-ppo reward-eval`: how far the reward head of a run can be believed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.algorithms.reliability import best_of_n_gain, length_r2, mean_and_error, pair_accuracy
from hydra_ppo.cli.features import check_reward_role
from hydra_ppo.cli.generate import Sampling
from hydra_ppo.cli.opened import Opened, open_model, open_tokenizer
from hydra_ppo.cli.pairs import Pairs, load_pairs
from hydra_ppo.cli.saved import check_file, check_saved, run_config
from hydra_ppo.config.rewards import RewardSettings, RewardSource
from hydra_ppo.config.settings import PPOConfig, RolloutSettings
from hydra_ppo.data.rows import PromptRow, load_prompts, prompt_key
from hydra_ppo.data.text import StopStrings, answer_texts, unknown_ids
from hydra_ppo.errors import ConfigError
from hydra_ppo.runtime.tables import print_table

if TYPE_CHECKING:
    from torch import Tensor

    from hydra_ppo.rewards.scorer import Scorer

    Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], tuple[list[float], Tensor]]
    """Of prompts and answers: scores, and mean states (N, H)."""


@dataclass(frozen=True)
class Sampled:
    """Which answers of the current policy are sampled.

    Attributes:
        best_of: answers to each prompt; 0 samples none.
        prompts: most prompts.
        max_new_tokens: longest answer; None is as the run's.
        seed: of the samples, and of clusters.
    """

    best_of: int = 16
    prompts: int = 200
    max_new_tokens: int | None = None
    seed: int = 0


def reward_eval(
    run: Path,
    source: str,
    *,
    heads: Path | None = None,
    judge: str | None = None,
    sampled: Sampled | None = None,
    clusters: int = 8,
    output: Path | None = None,
    flags: Sequence[str] = (),
    rows: int = 16,
) -> dict[str, Any]:
    """Measure a reward head on pairs and on what the current policy says, and print a table.

    Args:
        run: folder of a run, or a checkpoint.
        source: a file or a hub dataset of pairs; samples answer its prompts.
        heads: folder of heads to measure in place of the run's own.
        judge: `module:function`, as a reward function, that orders samples independently.
        sampled: which answers are sampled.
        clusters: of mean states, each with its own mean score; 0 makes none.
        output: JSON to write.
        flags: settings of the run to change.
        rows: most texts of one pass.

    Returns:
        The numbers that are printed, and `clusters`.

    Raises:
        ConfigError: where the run has no reward head that was trained and no heads are named, or a setting is wrong.
        DataError: where no row can be used.
    """
    sampled = sampled or Sampled()
    manifest = check_saved(run)
    check_reward_role(run)
    if heads is None and not manifest["reward_head_trained"]:
        raise ConfigError(
            f"run={str(run)!r} has a reward head that was never trained and says nothing; name heads with --heads, or a run of "
            "sft with reward_coef above 0."
        )
    check_file("output", output)
    config = run_config(run, ["--data.train", source, *flags])
    judging = _judge(judge, config)
    tokenizer = open_tokenizer(run, config)
    pairs = load_pairs(source, tokenizer, config.data)
    if not all(pairs.labelled()):
        raise ConfigError(f"source={source!r} has pairs without a label, on which no head is right or wrong; leave them out.")
    role = "actor" if "actor" in manifest["roles"] else "reference"
    prompts = _prompts(source, pairs, tokenizer, config, sampled) if sampled.best_of else []
    if judging is not None:
        judging.check([row.columns for row in prompts])
    opened = open_model(run, config, tokenizer, [role, "reward"] if sampled.best_of else ["reward"])
    score = _scoring(opened, heads, rows)
    numbers, groups = _of_pairs(pairs, score, clusters, sampled.seed)
    if prompts:
        rollout = config.rollout if isinstance(config, PPOConfig) else RolloutSettings()
        drawn = Sampling(max_new_tokens=sampled.max_new_tokens, batch_size=rows, seed=sampled.seed).over(rollout)
        numbers |= _of_samples(opened, role, prompts, drawn, sampled, score, judging)
    for note in pairs.notes(source):
        print(note)
    _show(numbers, groups, sampled.best_of if prompts else 0, role)
    found = {**numbers, "clusters": groups}
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {output}.")
    return found


def _judge(judge: str | None, config: Any) -> Scorer | None:
    if judge is None:
        return None
    import torch

    from hydra_ppo.rewards.scorer import Scorer

    limits = config.reward if isinstance(config, PPOConfig) else RewardSettings()
    given = RewardSettings(sources=[RewardSource("function", judge)], time_limit=limits.time_limit, isolation=limits.isolation)
    return Scorer(given, torch.device("cpu"))


def _prompts(source: str, pairs: Pairs, tokenizer: Any, config: Any, sampled: Sampled) -> list[PromptRow]:
    """Return the first prompts of the pairs, each once."""
    loaded = load_prompts(iter(pairs.rows), tokenizer, replace(config.data, format="pairs", columns={}))
    once = {prompt_key(row): row for row in reversed(loaded.rows)}
    return list(reversed(once.values()))[: sampled.prompts]


def _scoring(opened: Opened, heads: Path | None, rows: int) -> Score:
    """Return what scores answers, and gives their mean states: the run's own head, or the mean of those in a folder."""
    from hydra_ppo.model.origin import check_origin, origin_of
    from hydra_ppo.rewards.stored_heads import read_heads
    from hydra_ppo.rollout.scoring import answer_states, scores_and_means

    model, ends, pad_id = opened.model, opened.ends, opened.pad_id
    if heads is None:

        def own(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[list[float], Tensor]:
            scores, means = scores_and_means(model, prompts, answers, ends, pad_id=pad_id, rows=rows)
            return scores.tolist(), means

        return own
    read = read_heads(heads)
    note = check_origin(read.origin, origin_of(model, ends[0]), f"heads={str(heads)!r}")
    if note is not None:
        print(note)

    def stored(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> tuple[list[float], Tensor]:
        states, means = answer_states(model, prompts, answers, ends, pad_id=pad_id, rows=rows, means=True)
        assert means is not None
        return read.members(states).mean(dim=1).tolist(), means

    return stored


def _of_pairs(pairs: Pairs, score: Score, clusters: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return numbers of given pairs, and of clusters of their answers."""
    import torch

    from hydra_ppo.algorithms.calibration import expected_calibration_error

    rows = pairs.loaded.rows
    chosen, of_chosen = score([row.prompt_ids for row in rows], [row.chosen_ids for row in rows])
    rejected, of_rejected = score([row.before_rejected for row in rows], [row.rejected_ids for row in rows])
    means = torch.cat([of_chosen, of_rejected])
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    accuracy, error = pair_accuracy(margins)
    lengths = [len(row.chosen_ids) for row in pairs.loaded.rows] + [len(row.rejected_ids) for row in pairs.loaded.rows]
    both = [*chosen, *rejected]
    numbers: dict[str, Any] = {
        "pairs": len(margins),
        "accuracy": accuracy,
        "accuracy_se": error,
        "ece": expected_calibration_error(torch.tensor(margins)).item(),
        "length_r2": length_r2(both, lengths),
        "score_mean": statistics.fmean(both),
        "score_sd": statistics.pstdev(both),
    }
    groups = _clusters(means, both, margins, clusters, seed) if clusters else []
    return numbers, groups


def _clusters(means: Tensor, scores: Sequence[float], margins: Sequence[float], count: int, seed: int) -> list[dict[str, Any]]:
    """Return size, mean and standard deviation of scores, and accuracy on pairs whose better answer is there, by cluster."""
    import torch

    from hydra_ppo.algorithms.clusters import kmeans

    numbers = kmeans(means.float(), count, torch.Generator().manual_seed(seed)).tolist()
    found = []
    for cluster in sorted(set(numbers), key=lambda number: -numbers.count(number)):
        inside = [score for score, number in zip(scores, numbers, strict=True) if number == cluster]
        own = [margin for margin, number in zip(margins, numbers, strict=False) if number == cluster]
        found.append(
            {
                "answers": len(inside),
                "score_mean": statistics.fmean(inside),
                "score_sd": statistics.pstdev(inside),
                "accuracy": pair_accuracy(own)[0] if own else None,
            }
        )
    return found


def _of_samples(
    opened: Opened,
    role: str,
    prompts: Sequence[PromptRow],
    rollout: RolloutSettings,
    sampled: Sampled,
    score: Score,
    judge: Scorer | None,
) -> dict[str, Any]:
    """Sample answers of the policy, and return what the best of them gain, by the head and by the judge."""
    import torch

    from hydra_ppo.rollout.sampling import sample

    model, tokenizer, count = opened.model, opened.tokenizer, sampled.best_of
    asked = [row for row in prompts for _ in range(count)]
    ids = [row.ids for row in asked]
    generator = torch.Generator(model.device).manual_seed(sampled.seed)
    never = unknown_ids(tokenizer, model.architecture.output_embeddings.weight.shape[0])
    stop = StopStrings(tokenizer, rollout.stop) if rollout.stop else None
    answers = sample(model, ids, rollout, opened.ends, generator, role=role, never=never, stopped=stop).responses
    by_head = _table(score(ids, answers)[0], count)
    gain, error = best_of_n_gain(by_head)
    numbers: dict[str, Any] = {
        "prompts": len(prompts),
        "best_of": count,
        "policy_score": statistics.fmean(value for row in by_head for value in row),
        "policy_length_r2": length_r2([v for row in by_head for v in row], [len(answer) for answer in answers]),
        "best_of_gain": gain,
        "best_of_gain_se": error,
    }
    if judge is None:
        return numbers
    stopped = [False] * len(answers) if stop is None else stop(answers)
    ended = [done or answer[-1] in opened.ends for done, answer in zip(stopped, answers, strict=True)]
    judged = _table(judge.score([], _responses(opened, asked, answers, ended), "reward-eval").total, count)
    best = [row[own.index(max(own))] - statistics.fmean(row) for own, row in zip(by_head, judged, strict=True)]
    ordered = [(own, row) for own, row in zip(by_head, judged, strict=True) if row[0] != row[1]]
    signs = [(own[0] - own[1]) * (1 if row[0] > row[1] else -1) for own, row in ordered]
    numbers["judged_gain"], numbers["judged_gain_se"] = mean_and_error(best)
    numbers["judge_best_gain"], numbers["judge_best_gain_se"] = best_of_n_gain(judged)
    numbers["policy_pairs"] = len(signs)
    if signs:
        numbers["policy_accuracy"], numbers["policy_accuracy_se"] = pair_accuracy(signs)
    return numbers


def _responses(opened: Opened, asked: Sequence[PromptRow], answers: Sequence[Sequence[int]], ended: Sequence[bool]) -> Any:
    from hydra_ppo.rewards.responses import Responses

    tokenizer, ids = opened.tokenizer, [row.ids for row in asked]
    spelled = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return Responses(
        prompts=[row.text for row in asked],
        texts=answer_texts(tokenizer, ids, answers, show_special=False, ends=opened.ends),
        conversations=[row.messages for row in asked],
        columns=[row.columns for row in asked],
        ended=ended,
        queries=tokenizer.batch_decode([[*a, *b] for a, b in zip(ids, answers, strict=True)], **spelled),
        begin=tokenizer.bos_token,
    )


def _table(values: Sequence[float], count: int) -> list[list[float]]:
    return [list(values[start : start + count]) for start in range(0, len(values), count)]


WORDS = {
    "pairs": "pairs",
    "accuracy": "accuracy",
    "ece": "calibration error (ECE)",
    "length_r2": "R^2 of score on log length",
    "score_mean": "mean score",
    "score_sd": "score, std. deviation",
    "prompts": "prompts sampled",
    "policy_score": "mean score of the policy's answers",
    "policy_length_r2": "R^2 on log length, policy's answers",
    "best_of_gain": "gain of the best by the head, by the head",
    "judged_gain": "gain of the best by the head, by the judge",
    "judge_best_gain": "gain of the best by the judge, by the judge",
    "policy_pairs": "policy's pairs that the judge orders",
    "policy_accuracy": "accuracy on those",
}


def _show(numbers: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], best_of: int, role: str) -> None:
    title = "Reward head" + (f", best of {best_of} of the {role}" if best_of else "")
    table = Table(title=title, title_justify="left")
    for name, side in (("quantity", "left"), ("value", "right"), ("std. error", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]  # a name of rich
    for name, words in WORDS.items():
        if name in numbers:
            table.add_row(words, _number(numbers[name]), _number(numbers.get(f"{name}_se"), ""))
    console = Console()
    print_table(console, table)
    if groups:
        table = Table(title="Clusters of mean states", title_justify="left")
        for column in ("answers", "mean score", "std. deviation", "accuracy"):
            table.add_column(column, justify="right")
        for group in groups:
            table.add_row(*(_number(value) for value in group.values()))
        print_table(console, table)


def _number(value: float | int | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
