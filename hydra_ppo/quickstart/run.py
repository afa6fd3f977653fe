"""`hydra-ppo quickstart`: corpus, tokenizer, model, joint SFT + reward model, PPO, and a judgement by the gold scorer.

Everything goes through the same commands that a real run uses. The gold scorer labels the preference pairs (a tenth of
them wrongly) and judges the result; PPO never sees it, only the reward head that was learned from the pairs.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hydra_ppo.config.settings import (
    DataSettings,
    KLSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    PPOConfig,
    RolloutSettings,
    RunSettings,
    SFTConfig,
)
from hydra_ppo.errors import ConfigError
from hydra_ppo.quickstart.corpus import Corpus, build_llama_config, gold_score, make_corpus, train_tokenizer

if TYPE_CHECKING:
    from hydra_ppo.model.hydra import HydraModel

SUMMARY = "summary.json"
PARTS = ("data", "base", "sft", "ppo", SUMMARY)
"""What a quickstart writes into its folder, and all that --overwrite removes."""

SAMPLES_SHOWN = 6


def main(output: str | Path, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Run the whole pipeline and print what came of it.

    Args:
        output: folder for data, models, runs and `summary.json`.
        seed: of corpus, model and both stages.
        overwrite: replace what an earlier quickstart left there.

    Returns:
        What `summary.json` holds: gold_before, gold_after, gold_gain_se, win_rate, kl, reward_accuracy, seconds, peak_bytes,
        responses_per_second and the memory table.

    Raises:
        ConfigError: when the folder is in use.
    """
    from transformers import AutoConfig

    from hydra_ppo.cli import commands
    from hydra_ppo.quickstart.threads import choose_threads

    started = time.perf_counter()
    folder = Path(output)
    _prepare(folder, overwrite)
    console = Console(stderr=True)
    console.print(f"[bold]1/4[/bold] Corpus, tokenizer and a small Llama in {escape(str(folder))}", highlight=False)
    texts = write_inputs(folder, seed)
    if (chosen := choose_threads(AutoConfig.from_pretrained(folder / "base"))) is not None:
        console.print(chosen, highlight=False)
    console.print("[bold]2/4[/bold] Joint SFT and reward modelling", highlight=False)
    commands.sft(sft_config(folder, seed))
    console.print("[bold]3/4[/bold] PPO against the learned reward head", highlight=False)
    commands.ppo(ppo_config(folder, seed))
    console.print("[bold]4/4[/bold] Judgement by the gold scorer", highlight=False)
    judged = _judge(folder, texts, seed)
    sft, ppo = (json.loads((folder / stage / "summary.json").read_text()) for stage in ("sft", "ppo"))
    summary = {
        "gold_before": judged.before,
        "gold_after": judged.after,
        "gold_gain_se": judged.gain_se,
        "win_rate": judged.win_rate,
        "kl": ppo["eval_kl"],
        "reward_accuracy": sft["eval/reward_accuracy"],
        "seconds": time.perf_counter() - started,
        "peak_bytes": ppo["peak_bytes"],
        "responses_per_second": ppo["responses_per_second"],
        "memory": _memory(ppo, judged.base_bytes),
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    _report(Console(), folder, summary, judged)
    return summary


def sft_config(folder: Path, seed: int) -> SFTConfig:
    """Settings of the first stage: full fine-tuning, since the base starts from random weights."""
    return SFTConfig(
        model=ModelSettings(name_or_path=str(folder / "base"), gradient_checkpointing=False, device="auto"),
        data=DataSettings(
            train=str(folder / "data" / "train.jsonl"),
            eval=str(folder / "data" / "eval.jsonl"),
            max_prompt_tokens=24,
            max_response_tokens=48,
        ),
        run=RunSettings(output=str(folder / "sft"), seed=seed, memory="never", log_every=10),
        optimizer=OptimizerSettings(learning_rate=3e-3, weight_decay=0.01, schedule="cosine", warmup_fraction=0.05),
        method="full",
        reward_coef=1.0,
        epochs=1,  # many pairs once; docs/notes.md has what several passes over fewer gave
        batch_size=16,
        microbatch_size=16,
        eval_every=200,
    )


def ppo_config(folder: Path, seed: int) -> PPOConfig:
    """Settings of the second stage."""
    return PPOConfig(
        # Of a model this small activations are few, and computing them again costs a third of an update.
        model=ModelSettings(
            name_or_path=str(folder / "sft"), device="auto", lora=LoraSettings(r=16, alpha=32), gradient_checkpointing=False
        ),
        data=DataSettings(
            train=str(folder / "data" / "prompts.jsonl"), eval=str(folder / "data" / "eval_prompts.jsonl"), max_prompt_tokens=24
        ),
        run=RunSettings(output=str(folder / "ppo"), seed=seed, save_every=0),
        rollout=RolloutSettings(batch_size=64, max_new_tokens=40, score_batch_size=64),
        kl=KLSettings(coef=0.1),
        optimizer=OptimizerSettings(learning_rate=1e-3, schedule="linear"),
        steps=32,
        ppo_epochs=3,
        minibatch_size=32,
        microbatch_size=32,
        entropy_coef=0.01,
        sample_every=1000,  # the first step; held-out prompts are answered before and after
        eval_prompts=200,
    )


@dataclass(frozen=True)
class Judgement:
    """Gold scores of the held-out prompts before (SFT policy) and after PPO."""

    before: float
    after: float
    gain_se: float
    win_rate: float
    base_bytes: int
    samples: list[tuple[str, str, float, str, float]]


def _prepare(folder: Path, overwrite: bool) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ConfigError(f"output={str(folder)!r} holds an earlier quickstart; choose another folder or pass --overwrite.")
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in PARTS)
        if foreign:
            raise ConfigError(f"output={str(folder)!r} holds {foreign[0]!r}, which no quickstart wrote; choose another folder.")
        for part in PARTS:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def write_inputs(folder: Path, seed: int, corpus: Corpus | None = None) -> list[str]:
    """Write data, tokenizer and a base with random weights; return the held-out prompts.

    Args:
        folder: takes `data` and `base`.
        seed: of the corpus and of the weights.
        corpus: None is the quickstart's own.
    """
    from transformers import AutoModelForCausalLM, set_seed

    corpus = corpus or make_corpus(seed)
    data = folder / "data"
    data.mkdir()
    for name, rows in (
        ("train", [joined(pair) for pair in corpus.preferences]),
        ("eval", [joined(pair) for pair in corpus.eval_preferences]),
        ("prompts", corpus.prompts),
        ("eval_prompts", corpus.eval_prompts),
    ):
        (data / f"{name}.jsonl").write_text(jsonl(rows))
    pairs = [*corpus.preferences, *corpus.eval_preferences]
    tokenizer = train_tokenizer([pair["prompt"] + " " + pair[side] for pair in pairs for side in ("chosen", "rejected")])
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(build_llama_config(len(tokenizer)))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return [row["prompt"] for row in corpus.eval_prompts]


def joined(pair: Mapping[str, str]) -> dict[str, str]:
    """Return a pair whose answers begin with the space that parts them from their prompt, so that both together are a text."""
    return {"prompt": pair["prompt"], **{side: " " + pair[side] for side in ("chosen", "rejected")}}


def jsonl(rows: Iterable[Mapping[str, str]]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _judge(folder: Path, prompts: Sequence[str], seed: int) -> Judgement:
    """Sample every held-out prompt from the SFT policy and from the actor, and let the gold scorer compare."""
    from transformers import AutoTokenizer

    from hydra_ppo.model.hydra import HydraModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo")
    model = HydraModel.from_pretrained(folder / "ppo")
    rollout = ppo_config(folder, seed).rollout
    texts, gold = {}, {}
    for role in ("reference", "actor"):
        texts[role] = sample_texts(model, tokenizer, prompts, rollout, seed, role)
        gold[role] = [gold_score(prompt, text) for prompt, text in zip(prompts, texts[role], strict=True)]
    before, after = gold["reference"], gold["actor"]
    count = len(prompts)
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / count
    shown = range(0, count, max(1, count // SAMPLES_SHOWN))[:SAMPLES_SHOWN]
    return Judgement(
        before=sum(before) / count,
        after=sum(after) / count,
        gain_se=math.sqrt(sum((g - mean) ** 2 for g in gains) / (count - 1) / count),
        win_rate=sum(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gains) / count,
        base_bytes=sum(p.numel() * p.element_size() for n, p in model.base.named_parameters() if "lora_" not in n),
        samples=[(prompts[i], texts["reference"][i], before[i], texts["actor"][i], after[i]) for i in shown],
    )


def sample_texts(
    model: HydraModel, tokenizer: Any, prompts: Sequence[str], rollout: RolloutSettings, seed: int, role: str
) -> list[str]:
    """Sample a response to each prompt from `actor` or `reference`."""
    import torch

    from hydra_ppo.model.answers import end_tokens
    from hydra_ppo.rollout.sampling import sample

    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    generator = torch.Generator(model.device).manual_seed(seed)
    sampled = sample(model, ids, rollout, end_tokens(model, tokenizer), generator, role=role)
    return tokenizer.batch_decode(sampled.responses, skip_special_tokens=True)


def _memory(ppo: Mapping[str, Any], base_bytes: int) -> dict[str, Any]:
    """Put the measured peaks beside the weights alone of four separate models."""
    return {"base_bytes": base_bytes, "four_models_bytes": 4 * base_bytes, "phase_peak_bytes": ppo["phase_peak_bytes"]}


def _report(console: Console, folder: Path, summary: Mapping[str, Any], judged: Judgement) -> None:
    samples = Table(title="Held-out prompts before and after PPO (gold score)", show_lines=True)
    for name in ("prompt", "SFT policy", "after PPO"):
        samples.add_column(name, overflow="fold", ratio=1)
    for prompt, before, gold_before, after, gold_after in judged.samples:
        samples.add_row(Text(prompt), Text(f"{before} ({gold_before:.2f})"), Text(f"{after} ({gold_after:.2f})"))
    console.print(samples)

    memory = Table(title="Live tensor bytes, MiB")
    memory.add_column("what")
    memory.add_column("MiB", justify="right")
    for phase, peak in (summary["memory"]["phase_peak_bytes"] or {}).items():
        memory.add_row(f"peak of {phase}", f"{peak / 2**20:.1f}")
    memory.add_row("the base, once", f"{summary['memory']['base_bytes'] / 2**20:.1f}", end_section=True)
    memory.add_row("four separate models, weights alone", f"{summary['memory']['four_models_bytes'] / 2**20:.1f}")
    console.print(memory)

    result = Table(title="Result", show_header=False)
    gain = summary["gold_after"] - summary["gold_before"]
    rows = (
        ("gold score, SFT policy", f"{summary['gold_before']:.2f}"),
        ("gold score, after PPO", f"{summary['gold_after']:.2f}"),
        ("gain, with its standard error", f"{gain:.2f} ± {summary['gold_gain_se']:.2f}"),
        ("win rate against the SFT policy", f"{summary['win_rate']:.1%}"),
        ("KL to the reference", f"{summary['kl']:.1f} nats per response"),
        ("reward model's held-out pair accuracy", f"{summary['reward_accuracy']:.1%}"),
        ("responses per second in PPO", f"{summary['responses_per_second']:.1f}"),
        ("seconds", f"{summary['seconds']:.0f}"),
        ("page", str(folder / "ppo" / "report.html")),
        ("plots", f"{folder / 'sft' / 'plots'} and {folder / 'ppo' / 'plots'}"),
    )
    for row in rows:
        result.add_row(*row)
    console.print(result)
