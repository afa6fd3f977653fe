"""What each saving of memory gives, one after another: simulated peaks by phase, and beside them what shapes alone say.

`python -m hydra_ppo.profiling.cli.savings --model llama-3.1-8b` prints the ladder of one model;
`--ends` the first and the last rung only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_ppo.compute.quantized_rows import GROUP
from hydra_ppo.profiling.cli.predictor import Predictor, parameters
from hydra_ppo.profiling.subjects.fake import meta_model
from hydra_ppo.profiling.subjects.shapes import model_config
from hydra_ppo.profiling.workload import Workload
from hydra_ppo.runtime.tables import print_table

GIB = 2**30

RUNGS: Mapping[str, Mapping[str, Any]] = {
    "today's defaults": {},
    "update_order: in-turn": {"update_order": "in-turn"},
    "optimizer.offload_in_rollout": {"offload_in_rollout": True},
    "optimizer.name: adamw-8bit": {"optimizer": "adamw-8bit"},
    "model.quantize_embeddings: int8": {"quantize_embeddings": "int8"},
    "rollout.kv_cache: int8": {"kv_cache": "int8"},
    "model.checkpoint_offload": {"checkpoint_offload": True},
    "model.tile_tokens": {"tile_tokens": 256},
}
"""What is switched on, in this order, each on top of those before."""


@dataclass(frozen=True)
class Shapes:
    """Numbers of a model that savings are in proportion to.

    Attributes:
        vocabulary: numbers of embedding and output head, once where tied.
        adapter: numbers of one adapter.
        cached: numbers that a token leaves in the cache.
        heads: key-value heads of all layers.
        layers, hidden: of the decoder.
    """

    vocabulary: int
    adapter: int
    cached: int
    heads: int
    layers: int
    hidden: int


def shapes_of(config: Any, rank: int) -> Shapes:
    """Return the numbers, from a model without weights.

    Args:
        config: Hugging Face config of a decoder.
        rank: of an adapter on all linear layers.
    """
    import torch

    model = meta_model(config, torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    copies = 1 if head.weight is embedding.weight else 2
    adapter = rank * parameters(config)[2]
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    vocabulary = copies * embedding.weight.numel()
    return Shapes(vocabulary, adapter, 2 * layers * heads * width, 2 * layers * heads, layers, config.hidden_size)


def expected(shapes: Shapes, workload: Workload, change: Mapping[str, Any]) -> dict[str, float]:
    """Return what a rung should take off, in bytes by phase, from shapes alone; bf16, so far as it is exact.

    Args:
        shapes: of the model.
        workload: sizes.
        change: what the rung switches on.
    """
    compute = 2
    moments = 16 * shapes.adapter  # of both adapters, fp32
    if "update_order" in change:
        return {"update-actor": 4 * shapes.adapter, "update-critic": 4 * shapes.adapter, "optimizer": 4 * shapes.adapter}
    if "offload_in_rollout" in change:
        return {"rollout": moments, "score": moments}
    if "optimizer" in change:
        return dict.fromkeys(("update-actor", "update-critic", "optimizer"), 16 * shapes.adapter - 4 * shapes.adapter)
    if "quantize_embeddings" in change:
        gain = shapes.vocabulary * (compute - 1 - compute / GROUP)
        return dict.fromkeys(("rollout", "score", "update-actor", "update-critic", "optimizer"), gain)
    if "kv_cache" in change:
        tokens = workload.rollout_batch * (workload.prompt + workload.response - 1)
        return {"rollout": tokens * (shapes.cached * (compute - 1) - shapes.heads * compute)}
    if "checkpoint_offload" in change:
        tokens = workload.microbatch * (workload.prompt + workload.response)
        # Of the last layer, and of the one that is recomputed, the input is there anyway.
        return dict.fromkeys(("update-actor", "update-critic"), (shapes.layers - 1) * tokens * shapes.hidden * compute)
    return {}


@dataclass(frozen=True)
class Rung:
    """One rung: bytes by phase, and what it was expected to take off each."""

    name: str
    phases: dict[str, int]
    expected: dict[str, float]

    @property
    def peak(self) -> int:
        """Highest of the phases."""
        return max(self.phases.values())


def climb(
    workload: Workload, ends: bool = False, say: Callable[[str], None] = lambda text: None, tile_tokens: int = 256
) -> list[Rung]:
    """Simulate the ladder; with `ends` its first and last rung alone.

    Args:
        workload: the first rung.
        tile_tokens: of the last rung.
        say: takes a line about what is being simulated.
    """
    shapes, predictor = shapes_of(model_config(workload.model), workload.rank), Predictor(workload, say)
    found: list[Rung] = []
    for number, (name, change) in enumerate(RUNGS.items()):
        if "tile_tokens" in change:
            change = {"tile_tokens": tile_tokens}
        workload = replace(workload, **change)
        if not ends or number in (0, len(RUNGS) - 1):
            gains = expected(shapes, workload, change)
            found.append(Rung(name if not ends or not number else "all of it", predictor.phases(workload), gains))
    return found


def table_of(model: str, rungs: list[Rung]) -> Table:
    """Lay out peaks by phase, what each rung took off and, in brackets, what shapes say."""
    title = f"{model}: peak of each phase, GiB; in brackets what the row takes off, and what shapes say that it does"
    table = Table(title=title, title_justify="left")
    phases = list(rungs[0].phases)
    for name in ("on top of the row above", *phases, "peak"):
        table.add_column(name)
    before: Rung | None = None
    for rung in rungs:
        cells = []
        for phase in phases:
            gain = rung.expected.get(phase)
            drop = None if before is None else before.phases[phase] - rung.phases[phase]
            shown = f" ({drop / GIB:.2f}; {gain / GIB:.2f})" if gain and drop is not None and before is not None else ""
            cells.append(f"{rung.phases[phase] / GIB:.2f}{shown}")
        table.add_row(rung.name, *cells, f"{rung.peak / GIB:.2f}")
        before = rung
    return table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--rollout-batch", type=int, default=8)
    parser.add_argument("--tile-tokens", type=int, default=256, help="Of the last rung.")
    parser.add_argument("--ends", action="store_true", help="The first and the last rung only.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    workload = Workload(
        model=options.model,
        quantization="nf4",
        rank=options.rank,
        prompt=options.prompt,
        response=options.response,
        rollout_batch=options.rollout_batch,
    )
    rungs = climb(workload, options.ends, lambda text: print(text, file=sys.stderr), options.tile_tokens)
    if options.json:
        print(json.dumps([{"name": rung.name, "phases": rung.phases, "expected": rung.expected} for rung in rungs], indent=2))
    else:
        print_table(Console(), table_of(options.model, rungs))


if __name__ == "__main__":
    main()
