"""`hydra-ppo generate`: samples from the roles of a run, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.opened import Opened, open_model, open_tokenizer
from hydra_ppo.cli.saved import check_file, check_saved, run_config
from hydra_ppo.config.settings import PPOConfig, RolloutSettings, VLLMSettings
from hydra_ppo.data.rows import PromptRow, load_prompts
from hydra_ppo.data.text import StopStrings, answer_texts, unknown_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHOWN = 8
"""Prompts that are printed where all of them are written to a file."""


@dataclass(frozen=True)
class Sampling:
    """How to sample; None is as the run sampled, and so is what is not named here: its stop strings, its KV cache.

    Attributes:
        temperature: 0 takes the most likely token.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    samples: int = 1
    seed: int = 0
    batch_size: int = 16

    def over(self, rollout: RolloutSettings) -> RolloutSettings:
        """Return the settings of a rollout with these in place of its own."""
        found = replace(
            rollout,
            engine="native",
            vllm=VLLMSettings(),
            batch_size=self.batch_size,
            samples_per_prompt=1,
            generation_batch_size=self.batch_size,
            max_new_tokens=rollout.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
        )
        if self.temperature == 0:
            return replace(found, temperature=1.0, top_k=1, top_p=None)
        return found if self.temperature is None else replace(found, temperature=self.temperature)


def generate(
    run: Path,
    *,
    prompts: str | None = None,
    question: str | None = None,
    plain: bool = False,
    roles: Sequence[str] = ("actor",),
    sampling: Sampling | None = None,
    output: Path | None = None,
    flags: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Sample answers to prompts from roles of a run; print them with the scores of its reward head, where it was trained.

    Each role draws with the same random numbers, so that what differs is the policy.

    Args:
        run: folder of a run, or a checkpoint.
        prompts: a file or a hub dataset.
        question: one prompt in place of those; a user's message where the tokenizer has a chat template.
        plain: let the question be plain text all the same.
        roles: of `actor`, `reference` and `base`, which is the model under the adapters. An sft run has no actor yet: its
            policy, the reference, stands in.
        sampling: how.
        output: JSONL to write, a line for each prompt and sample.
        flags: settings of the run to change, `--data.NAME VALUE` and `--model.NAME VALUE`.

    Returns:
        What is written: prompt, number of the sample, and by role response, tokens, ended, score.

    Raises:
        ConfigError: where the run has no such role, or a setting is wrong.
        DataError: where no prompt can be used.
    """
    manifest = check_saved(run)
    check_file("output", output)
    if "actor" not in manifest["roles"] and "actor" in roles:
        roles = ["reference" if role == "actor" else role for role in roles]
        print(f"{run} has no actor yet; the reference, its SFT policy, stands in.")
    sampling = sampling or Sampling()
    source = prompts or "the prompt"
    config = run_config(run, ["--data.train", source, *flags])
    rollout = sampling.over(config.rollout if isinstance(config, PPOConfig) else RolloutSettings())
    tokenizer = open_tokenizer(run, config)
    loaded = load_prompts(source if question is None else _question(question, tokenizer, plain), tokenizer, config.data)
    for reason, count in loaded.reasons.items():
        print(f"{source}: {count} rows: {reason}")
    opened = open_model(run, config, tokenizer, roles)
    asked = [(row, number) for row in loaded.rows for number in range(sampling.samples)]
    by_role = {role: _answers(opened, role, [row for row, _ in asked], rollout, sampling.seed) for role in roles}
    lines: list[dict[str, Any]] = [
        {"prompt": row.text, "sample": number, **{role: by_role[role][i] for role in roles}}
        for i, (row, number) in enumerate(asked)
    ]
    if output is not None:
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    shown = lines if output is None else lines[: SHOWN * sampling.samples]
    for text in _shown(shown, roles, sampling.samples):
        print(text)
    for role in roles:
        print(_summary(role, [line[role] for line in lines]))
    if output is not None:
        print(f"Wrote {len(lines)} lines to {output}.")
    return lines


def _question(text: str, tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[dict[str, Any]]:
    """Return rows of one prompt: a user's message where the tokenizer has a chat template, unless it is to stay plain."""
    if plain or not tokenizer.chat_template:
        return [{"prompt": text}]
    return [{"prompt": [{"role": "user", "content": text}]}]


def _answers(opened: Opened, role: str, rows: Sequence[PromptRow], rollout: RolloutSettings, seed: int) -> list[dict[str, Any]]:
    import torch

    from hydra_ppo.rollout.sampling import sample
    from hydra_ppo.rollout.scoring import reward_scores

    model, tokenizer = opened.model, opened.tokenizer
    prompts = [row.ids for row in rows]
    generator = torch.Generator(model.device).manual_seed(seed)
    never = unknown_ids(tokenizer, model.architecture.output_embeddings.weight.shape[0])
    stop = StopStrings(tokenizer, rollout.stop) if rollout.stop else None
    responses = sample(model, prompts, rollout, opened.ends, generator, role=role, never=never, stopped=stop).responses
    stopped = [False] * len(responses) if stop is None else stop(responses)
    scores: list[float] | list[None] = [None] * len(rows)
    if opened.scores:
        size = rollout.generation_batch_size or len(rows)
        scores = reward_scores(model, prompts, responses, opened.ends, pad_id=opened.pad_id, rows=size)
    texts = answer_texts(tokenizer, prompts, responses, show_special=True, ends=opened.ends)
    return [
        {"response": text, "tokens": len(ids), "ended": done or ids[-1] in opened.ends, "score": score}
        for text, ids, done, score in zip(texts, responses, stopped, scores, strict=True)
    ]


def _shown(lines: Sequence[Mapping[str, Any]], roles: Sequence[str], samples: int) -> Iterator[str]:
    """Yield prompts and answers as they are printed: the roles of each sample below one another."""
    width = max(map(len, roles))
    for i, line in enumerate(lines):
        if i % samples == 0:
            yield f"\n{line['prompt']}"
        for role in roles:
            answer = line[role]
            score = "" if answer["score"] is None else f" {answer['score']:+.3f}"
            text = answer["response"].strip().replace("\n", "\n" + " " * (width + len(score) + 4))
            yield f"  {role:<{width}}{score}  {text}" + ("" if answer["ended"] else " [not ended]")


def _summary(role: str, answers: Sequence[Mapping[str, Any]]) -> str:
    count = len(answers)
    tokens, ended = (sum(answer[name] for answer in answers) / count for name in ("tokens", "ended"))
    scored = [answer["score"] for answer in answers if answer["score"] is not None]
    mean = f", mean score {sum(scored) / len(scored):+.4f}" if scored else ""
    return f"{role}: {count} answers{mean}, {tokens:.1f} tokens, {ended:.0%} ended"
