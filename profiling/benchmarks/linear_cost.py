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
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from hydra_ppo.cli.main import BAD_INPUT, DONE
from hydra_ppo.config.settings import LoraSettings, RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.profiling.benchmarks.attention_time import AttentionClock, timed_attention
from hydra_ppo.profiling.benchmarks.linear_report import Cell, figure, tables, write
from hydra_ppo.profiling.benchmarks.peers.load import undisturbed
from hydra_ppo.profiling.benchmarks.phases import PHASES
from hydra_ppo.profiling.benchmarks.trainers import endless_llama, make_trainer, random_model, random_prompts
from hydra_ppo.runtime.tables import print_table
from hydra_ppo.training.optim import state_tensors

PROMPT_SHARE = 8
MICRO = 1e-6


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


class Subject:
    """A trainer at one response length; trainers of one vocabulary share their model."""

    def __init__(self, model: HydraModel, response_tokens: int, sizes: Sizes) -> None:
        self.model, self.response_tokens, self.sizes = model, response_tokens, sizes
        self.prompt_tokens = max(1, response_tokens // PROMPT_SHARE)
        self.vocabulary = model.causal_lm.config.vocab_size
        rows = sizes.tokens // response_tokens
        per_pass = sizes.pass_tokens // response_tokens
        self.clock = AttentionClock()
        self.trainer = make_trainer(
            model,
            random_prompts(self.vocabulary, self.prompt_tokens, rows),
            RolloutSettings(
                batch_size=rows,
                max_new_tokens=response_tokens,
                generation_batch_size=sizes.decoded,
                score_batch_size=per_pass,
            ),
            memory="always",
            on_phase=lambda phase: self.clock(phase),
            ppo_epochs=1,
            minibatch_size=per_pass,
            microbatch_size=per_pass,
        )

    def time(self) -> AttentionClock:
        """Do a step and return what it took."""
        self.clock = AttentionClock()
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
        static = model + storage_bytes(state_tensors(self.trainer.progress.optimizer))
        found = dict.fromkeys(PHASES, 0)
        for phase, peak in self.trainer.memory.peaks.items():
            name, alive = (phase, model) if phase in found else ("update", static)
            found[name] = max(found[name], peak - alive)
        return found, static

    def cell(self, clocks: Sequence[AttentionClock], peaks: Mapping[str, int], static: int, disturbed: int | None) -> Cell:
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
    config = endless_llama(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=2 * longest,
    )
    return random_model(config, LoraSettings(r=sizes.rank, alpha=2 * sizes.rank))


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
    clocks: list[list[AttentionClock]] = [[] for _ in subjects]
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
        return BAD_INPUT
    write(cells, options.rounds, asdict(sizes), options.output)
    figure(cells).savefig(options.output.with_suffix(".png"))
    title = f"Cost of a PPO step per token, {options.threads} threads, {options.rounds} rounds"
    for table in tables(cells, title):
        print_table(Console(), table)
    say(f"written to {options.output} and {options.output.with_suffix('.png')}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
