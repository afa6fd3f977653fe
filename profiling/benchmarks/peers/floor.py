"""Multiply-adds that a PPO update on one shared base with LoRA cannot avoid, phase by phase.

What is counted, for rows of T = prompt + response tokens:

- linear layers of a decoder layer: q, k, v, o, gate, up, down, keys and values with their own number of heads
- LoRA beside each of them, on the layers above the trunk: x A^T and its product with B^T
- attention's own two products, over the T (T + 1) / 2 pairs that causal attention leaves of T^2
- the head, on response tokens only

Backward passes: through a frozen weight the gradient of its input, as much as its forward pass; through LoRA four products of
half its forward pass each (weights A and B, what is between them, the input); through attention twice its forward pass. The
first layer above the trunk needs no gradient of what enters its q, k and v. Nothing is recomputed.

Not counted: scalar heads, norms, softmax, sampling from a distribution, the optimizer. Every layer is counted for every
token, the last one too, although what it makes of prompt tokens but one is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hydra_ppo.profiling.benchmarks.peers.workloads import LORA_RANK, Workload
from hydra_ppo.profiling.benchmarks.phases import PHASES


@dataclass(frozen=True)
class Linear:
    """A linear layer (out, in) and what it costs, per token; see the module for the backward passes."""

    inputs: int
    outputs: int

    @property
    def frozen(self) -> int:
        """Multiply-adds of the weight, in a forward pass or for the gradient of the input."""
        return self.inputs * self.outputs

    def lora(self, rank: int) -> int:
        """Multiply-adds of a LoRA of this rank in a forward pass."""
        return rank * (self.inputs + self.outputs)


def multiply_adds(workload: Workload, trunk_layers: int, rank: int = LORA_RANK, merged_rollout: bool = False) -> dict[str, int]:
    """Return the multiply-adds of one update by phase.

    rollout: every token but the last of a row goes through all layers once, the head sees every response token. score: one
    pass without adapters with the head, and one of the critic; the trunk runs in the first one only. update: per epoch actor
    and critic, forward and backward, above the trunk; the actor's head gives log-probs and their gradient.

    Args:
        trunk_layers: layers below all adapters.
        rank: of the LoRA.
        merged_rollout: responses are decoded with adapters merged into copies of the weights, so that only prompts go through
            them.
    """
    rows, tokens = workload.rows, workload.prompt_tokens + workload.response_tokens
    above = workload.layers - trunk_layers
    head = workload.response_tokens * workload.hidden * workload.vocabulary

    def forward(length: int, layers: int) -> int:
        return layers * (length * sum(layer.frozen for layer in layer_linears(workload)) + attention(workload, length))

    def adapters(length: int) -> int:
        return above * length * sum(layer.lora(rank) for layer in layer_linears(workload))

    entering = layer_linears(workload)[:3]  # q, k and v of the first layer above the trunk
    unneeded = tokens * sum(layer.frozen + rank * layer.inputs for layer in entering)
    linears = forward(tokens, above) - above * attention(workload, tokens)
    backward = linears + 2 * above * attention(workload, tokens) + 2 * adapters(tokens) - unneeded
    one_role = forward(tokens, above) + adapters(tokens) + backward
    adapted = workload.prompt_tokens if merged_rollout else tokens - 1
    return {
        "rollout": rows * (forward(tokens - 1, workload.layers) + adapters(adapted) + head),
        "score": rows * (forward(tokens, workload.layers) + head + forward(tokens, above) + adapters(tokens)),
        "update": workload.epochs * rows * (2 * one_role + 2 * head),
    }


def layer_linears(workload: Workload) -> tuple[Linear, ...]:
    """Return q, k, v, o, gate, up and down of a decoder layer."""
    hidden, inner = workload.hidden, workload.intermediate
    keys = hidden // workload.heads * workload.kv_heads
    return (
        *(Linear(hidden, hidden), Linear(hidden, keys), Linear(hidden, keys), Linear(hidden, hidden)),
        *(Linear(hidden, inner), Linear(hidden, inner), Linear(inner, hidden)),
    )


def attention(workload: Workload, tokens: int) -> int:
    """Return the multiply-adds of one row's causal attention in one layer: queries by keys, and weights by values."""
    return 2 * workload.hidden * (tokens * (tokens + 1) // 2)


def shares(work: Mapping[str, int], seconds: Mapping[str, float], rate: float) -> dict[str, float]:
    """Return by phase, and for the whole, how much of the time taken the multiply-adds need.

    Args:
        work: multiply-adds by phase.
        seconds: taken, by phase.
        rate: multiply-adds per second of a large matrix product.
    """
    found = {phase: work[phase] / rate / seconds[phase] for phase in PHASES}
    total = sum(seconds[phase] for phase in PHASES)
    return {**found, "whole": sum(work[phase] for phase in PHASES) / rate / total}
