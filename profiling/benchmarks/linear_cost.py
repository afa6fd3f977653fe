"""Shows how the cost of a PPO step grows: ``python -m hydra_ppo.profiling.benchmarks.linear_cost``.

The same number of response tokens is cut into rows of 64, 256 and 1024, with prompts of an eighth of that. All else that
matters per token is the same at every length: tokens of a scoring pass, of a micro-batch and of an optimizer step, rows that
are decoded together. So

- seconds per response token, at one vocabulary, may grow with the length by attention alone. The head multiplies every
  response token by every entry of the vocabulary, so between vocabularies nothing is compared but memory.
- the peak above what is alive anyway (model, optimizer state), per token of a pass, may not grow with the length, which would
  be a T x T, nor with the vocabulary, which would be a T x V. While sampling that holds less: the cache has as many tokens as
  are decoded together, and the logits of one step are (rows, V) by nature; both are small beside the update's peak.

"Attention itself" is the call of scaled_dot_product_attention (while decoding short rows, of what stands for it) and its
backward pass, timed inside the very steps that are reported. What the KV cache does beside it is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig

from hydra_ppo.config.settings import DataSettings, LoraSettings, ModelSettings, PPOConfig, RolloutSettings, RunSettings
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks.peers.load import undisturbed
from hydra_ppo.rollout import lean_decoding
from hydra_ppo.training.optim import state_tensors
from hydra_ppo.training.ppo import PPOTrainer

PHASES = ("rollout", "score", "update")
FLAT = 0.2
"""Relative difference between the largest and the smallest that still counts as flat."""

PROMPT_SHARE = 8
MICRO = 1e-6
KIB = 2**10
FORMAT = 1


@dataclass(frozen=True)
class Sizes:
    """What is the same in all cells.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, rank: of the model and its adapters.
        tokens: response tokens of a rollout, at least two passes.
        pass_tokens: response tokens of a scoring pass, of a micro-batch and of an optimizer step.
        decoded: rows that are decoded together.
    """

    hidden: int = 256
    intermediate: int = 768
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    rank: int = 16
    tokens: int = 4096
    pass_tokens: int = 1024
    decoded: int = 4


@dataclass(frozen=True)
class Cell:
    """One length and vocabulary; by phase (rollout, score, update), medians over the rounds.

    Attributes:
        response_tokens, vocabulary: of the cell.
        microseconds_per_token: time of the phase per response token.
        attention_microseconds_per_token: the part of it that attention itself takes.
        peak_bytes: most bytes alive above the static ones.
        peak_bytes_per_token: of a pass, its prompts included; for the rollout, of the rows decoded together.
        static_bytes: model and optimizer state.
        disturbed: rounds in which others used the machine, after repeats; None where the system does not say.
    """

    response_tokens: int
    vocabulary: int
    microseconds_per_token: dict[str, float]
    attention_microseconds_per_token: dict[str, float]
    peak_bytes: dict[str, int]
    peak_bytes_per_token: dict[str, float]
    static_bytes: int
    disturbed: int | None

    def without_attention(self, phase: str) -> float:
        """Return microseconds per response token that are not attention itself."""
        return self.microseconds_per_token[phase] - self.attention_microseconds_per_token[phase]


class Clock:
    """Adds up seconds by phase: all of them, and those of attention itself."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self.begun = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.attention = dict.fromkeys(PHASES, 0.0)

    def __call__(self, phase: str) -> None:
        """Begin a phase of the trainer; "end" begins none."""
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self.begun
        self.phase = None if phase == "end" else phase if phase in PHASES else "update"
        self.begun = now

    @contextmanager
    def paying_attention(self) -> Iterator[None]:
        """Count the block as attention itself."""
        begun = time.perf_counter()
        yield
        if self.phase is not None:
            self.attention[self.phase] += time.perf_counter() - begun


class _Timed(torch.autograd.Function):
    """Attention whose forward and backward pass each are a call of its own, so that both can be timed."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.clock = clock
        with clock.paying_attention(), torch.enable_grad():
            ctx.inputs = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))
            ctx.output = attention(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.clock.paying_attention():
            found = torch.autograd.grad(ctx.output, ctx.inputs, gradient)
        return None, None, *found


@contextmanager
def timed_attention(clock: Clock) -> Iterator[None]:
    """Time every attention inside the block, backward passes included."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def timed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            return _Timed.apply(clock, partial(attention, **options), query, key, value)
        with clock.paying_attention():
            return attention(query, key, value, **options)

    products = lean_decoding.attend_by_products

    def timed_products(*args: Any) -> Tensor:
        with clock.paying_attention():
            return products(*args)

    torch.nn.functional.scaled_dot_product_attention = timed
    lean_decoding.attend_by_products = timed_products
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
        lean_decoding.attend_by_products = products


class Subject:
    """A trainer at one response length; trainers of one vocabulary share their model."""

    def __init__(self, model: HydraModel, response_tokens: int, sizes: Sizes) -> None:
        self.model, self.response_tokens, self.sizes = model, response_tokens, sizes
        self.prompt_tokens = max(1, response_tokens // PROMPT_SHARE)
        self.vocabulary = model.causal_lm.config.vocab_size
        rows = sizes.tokens // response_tokens
        per_pass = sizes.pass_tokens // response_tokens
        config = PPOConfig(
            model=ModelSettings(name_or_path="unused"),
            data=DataSettings(train="unused"),
            run=RunSettings(output="unused", memory="always"),
            rollout=RolloutSettings(
                batch_size=rows,
                max_new_tokens=response_tokens,
                generation_batch_size=sizes.decoded,
                score_batch_size=per_pass,
            ),
            ppo_epochs=1,
            minibatch_size=per_pass,
            microbatch_size=per_pass,
        )
        source = random.Random(0)
        prompts = [[source.randrange(self.vocabulary) for _ in range(self.prompt_tokens)] for _ in range(rows)]
        self.clock = Clock()
        self.trainer = PPOTrainer(
            *(model, _tokenizer(self.vocabulary), config, [PromptRow("", tuple(ids)) for ids in prompts]),
            on_phase=lambda phase: self.clock(phase),
        )

    def time(self) -> Clock:
        """Do a step and return what it took."""
        self.clock = Clock()
        with timed_attention(self.clock):
            self.trainer.step(1)
            self.clock("end")
        return self.clock

    def weigh(self) -> tuple[dict[str, int], int]:
        """Do the first step; return its peaks by phase above the static bytes, and those.

        The first of its optimizer steps makes the optimizer's state, so that is static from the second micro-batch on.
        """
        model = storage_bytes([*self.model.parameters(), *self.model.buffers()])
        with self.trainer.memory.step(0):
            self.trainer.step(1)
        static = model + storage_bytes(state_tensors(self.trainer.optimizer))
        found = {"rollout": 0, "score": 0, "update": 0}
        for phase, peak in self.trainer.memory.peaks.items():
            name, alive = (phase, model) if phase in found else ("update", static)
            found[name] = max(found[name], peak - alive)
        return found, static

    def cell(self, clocks: Sequence[Clock], peaks: Mapping[str, int], static: int, disturbed: int | None) -> Cell:
        """Put together what was measured."""
        per_token = 1 / (self.sizes.tokens * MICRO)
        share = (self.response_tokens + self.prompt_tokens) / self.response_tokens
        alive = {"rollout": self.sizes.decoded * self.response_tokens * share}  # tokens alive at once
        alive |= dict.fromkeys(("score", "update"), self.sizes.pass_tokens * share)
        return Cell(
            response_tokens=self.response_tokens,
            vocabulary=self.vocabulary,
            microseconds_per_token={p: statistics.median(c.seconds[p] for c in clocks) * per_token for p in PHASES},
            attention_microseconds_per_token={p: statistics.median(c.attention[p] for c in clocks) * per_token for p in PHASES},
            peak_bytes=dict(peaks),
            peak_bytes_per_token={phase: peaks[phase] / alive[phase] for phase in PHASES},
            static_bytes=static,
            disturbed=disturbed,
        )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind the tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def make_model(vocabulary: int, longest: int, sizes: Sizes) -> HydraModel:
    """Return a random Llama for rows of up to `longest` response tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=2 * longest,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = HydraModel.from_config(config, dtype="fp32", device="cpu", lora=LoraSettings(r=sizes.rank, alpha=2 * sizes.rank))
    for head in model.heads.values():
        nn.init.normal_(head.weight, std=0.02)
    model.reward_head_trained = True  # its scores need no meaning here, and the trainer asks
    return model


def measure(
    lengths: Sequence[int], vocabularies: Sequence[int], rounds: int, sizes: Sizes, say: Callable[[str], None]
) -> list[Cell]:
    """Measure every cell; in each round all of them take turns, so that noise hits all alike.

    Raises:
        ConfigError: when a length does not cut the tokens into whole rows and passes.
    """
    for length in lengths:
        if length < 1 or sizes.pass_tokens % length or sizes.tokens % sizes.pass_tokens:
            raise ConfigError(
                f"length={length} does not cut {sizes.tokens} tokens into passes of {sizes.pass_tokens} and these into rows; "
                f"choose a divisor of {sizes.pass_tokens}."
            )
    subjects = []
    for vocabulary in vocabularies:
        model = make_model(vocabulary, max(lengths), sizes)
        subjects += [Subject(model, length, sizes) for length in lengths]
    weighed = []
    for subject in subjects:  # which warms up too
        say(f"bytes at length {subject.response_tokens}, vocabulary {subject.vocabulary}")
        weighed.append(subject.weigh())
    clocks: list[list[Clock]] = [[] for _ in subjects]
    loads: list[list[bool | None]] = [[] for _ in subjects]
    for number in range(1, rounds + 1):
        for subject, found, noisy in zip(subjects, clocks, loads, strict=True):
            clock, load = undisturbed(subject.time, os.getpid(), say)
            where = f"length {subject.response_tokens}, vocabulary {subject.vocabulary}"
            say(f"round {number} of {rounds}: {where}: {sum(clock.seconds.values()):.2f} s")
            found.append(clock)
            noisy.append(None if load is None else load.disturbed)
    return [
        subject.cell(found, *bytes_, None if None in noisy else sum(map(bool, noisy)))
        for subject, found, bytes_, noisy in zip(subjects, clocks, weighed, loads, strict=True)
    ]


def spread(numbers: Sequence[float]) -> float:
    """Return by how much the largest is above the smallest, relative to that."""
    return max(numbers) / min(numbers) - 1


def spreads(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the spread of each figure that is to be flat, by what it is.

    Times per token are compared over the lengths at one vocabulary, all of them and without attention itself; peaks per token
    of scoring and update over all cells.
    """
    found = {}
    for vocabulary in dict.fromkeys(cell.vocabulary for cell in cells):
        group = [cell for cell in cells if cell.vocabulary == vocabulary]
        for phase in PHASES:
            found[f"{phase} time, vocabulary {vocabulary}"] = spread([cell.microseconds_per_token[phase] for cell in group])
            rest = spread([cell.without_attention(phase) for cell in group])
            found[f"{phase} time without attention, vocabulary {vocabulary}"] = rest
    for phase in ("score", "update"):
        found[f"{phase} peak"] = spread([cell.peak_bytes_per_token[phase] for cell in cells])
    return found


def tables(cells: Sequence[Cell], title: str) -> list[Table]:
    """Return the cells, and how flat each figure is."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.caption = (
        "us: per response token, in brackets without attention itself. KiB: peak above model and optimizer state per "
    )
    shown.caption += "token of a pass (rollout: of the rows decoded together). * others used the machine."
    for column in ("V", "R", *(f"{phase} us" for phase in PHASES), *(f"{phase} KiB" for phase in PHASES)):
        shown.add_column(column, justify="right", no_wrap=True)
    for cell in cells:
        shown.add_row(
            str(cell.vocabulary),
            str(cell.response_tokens) + (" *" if cell.disturbed else ""),
            *(f"{cell.microseconds_per_token[phase]:.0f} ({cell.without_attention(phase):.0f})" for phase in PHASES),
            *(f"{cell.peak_bytes_per_token[phase] / KIB:.1f}" for phase in PHASES),
        )
    verdicts = Table(title=f"Largest over smallest; flat is within {FLAT:.0%}", title_justify="left")
    for column in ("per token", "above the smallest", ""):
        verdicts.add_column(column, justify="right" if column == "above the smallest" else "left", no_wrap=True)
    for name, found in spreads(cells).items():
        verdicts.add_row(name, f"{found:+.0%}", "flat" if found <= FLAT else "")
    return [shown, verdicts]


def figure(cells: Sequence[Cell]) -> Figure:
    """Return the picture: time per token by phase with and without attention itself, and the peak per token."""
    # The Figure class draws without pyplot, whose backend and state belong to the caller.
    drawn = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(PHASES) + 1)
    vocabularies = list(dict.fromkeys(cell.vocabulary for cell in cells))
    colours = dict(zip(vocabularies, ("#332288", "#cc6677", "#117733", "#ddcc77"), strict=False))
    for axes, phase in zip(panels, PHASES, strict=False):
        for vocabulary in vocabularies:
            group = [cell for cell in cells if cell.vocabulary == vocabulary]
            lengths = [cell.response_tokens for cell in group]
            style = {"color": colours.get(vocabulary, "#444444"), "marker": "o", "markersize": 4}
            axes.plot(lengths, [c.microseconds_per_token[phase] for c in group], label=f"vocabulary {vocabulary:,}", **style)
            label = "without attention itself" if vocabulary == vocabularies[-1] else None
            axes.plot(lengths, [c.without_attention(phase) for c in group], linestyle="--", label=label, **style)
        axes.set_title(phase, loc="left", fontsize=10)
    panels[0].set_ylabel("microseconds per response token")
    for vocabulary in vocabularies:
        group = [cell for cell in cells if cell.vocabulary == vocabulary]
        peaks = [max(cell.peak_bytes_per_token[phase] for phase in ("score", "update")) / KIB for cell in group]
        colour = colours.get(vocabulary, "#444444")
        panels[-1].plot([cell.response_tokens for cell in group], peaks, color=colour, marker="o", markersize=4)
    panels[-1].set_title("peak, KiB per token", loc="left", fontsize=10)
    lengths = sorted({cell.response_tokens for cell in cells})
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(0, 1.08 * max(number for line in axes.get_lines() for number in line.get_ydata()))
        axes.set_xlabel("response tokens")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=4)
    return drawn


def write(cells: Sequence[Cell], rounds: int, sizes: Sizes, path: Path) -> None:
    """Write the cells as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"format": FORMAT, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": rounds}
    found |= {"sizes": asdict(sizes), "spreads": spreads(cells), "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write JSON and picture; return 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m hydra_ppo.profiling.benchmarks.linear_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024], help="response tokens of a row")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000], help="sizes of the vocabulary")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each cell")
    parser.add_argument("--threads", type=int, default=2, help="threads to compute with")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/linear.json"), help="JSON; the picture goes beside it")
    options = parser.parse_args(argv)
    console, sizes = Console(stderr=True), Sizes()
    say = partial(console.print, highlight=False, markup=False)
    try:
        for name in ("rounds", "threads"):
            if (given := getattr(options, name)) < 1:
                raise ConfigError(f"{name}={given} must be at least 1; choose a larger one.")
        torch.set_num_threads(options.threads)
        cells = measure(options.lengths, options.vocabularies, options.rounds, sizes, say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    write(cells, options.rounds, sizes, options.output)
    figure(cells).savefig(options.output.with_suffix(".png"))
    title = f"Cost of a PPO step per token, {options.threads} threads, {options.rounds} rounds"
    paper = Console(width=max(100, Console().width))
    for table in tables(cells, title):
        paper.print(table)
    say(f"written to {options.output} and {options.output.with_suffix('.png')}")
    return 0


def _tokenizer(end_token: int) -> Any:
    """Stand in for a tokenizer: its end token cannot be sampled, so every response has its full length."""
    return SimpleNamespace(
        eos_token_id=end_token, pad_token_id=0, batch_decode=lambda rows, skip_special_tokens: [""] * len(rows)
    )


if __name__ == "__main__":
    sys.exit(main())
