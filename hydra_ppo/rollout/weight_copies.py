"""Copies of a role's weights to decode with: adapter merged in, layers that read the same input side by side, in bf16.

The base itself stays as it is, and so does everything that is trained or scored with it; so does the pass over the prompts.
What the copies round makes the sampler's log-probs differ a little from those of a pass: `rollout.max_drift` says what is done
about that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydra_ppo.compute.copied_linear import CopiedLinear
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.lora import active_adapter, base_under
from hydra_ppo.runtime.announce import allocating

KIND = "rollout copies"
"""What a profile calls the memory of the copies."""
BLOCK = 2**22
"""Weights of the output head that are copied at a time."""


class WeightCopies:
    """Makes each copy where it is first asked for, and keeps it; in the role that is in force then.

    Args:
        rows: decoded at once.

    Memory: 2 bytes for each weight of the decoder layers, and of the output head where it is held in another type or in another
    order; while one is made, the same weights in fp32 and the product of its adapter.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._projections: dict[tuple[int, ...], MergedProjections] = {}
        self._head: CopiedHead | None = None

    def projections(self, layers: Sequence[nn.Module]) -> MergedProjections:
        """Return one product for linear layers that read the same input."""
        key = tuple(map(id, layers))
        if key not in self._projections:
            with allocating(KIND):
                self._projections[key] = MergedProjections(layers, self.rows)
        return self._projections[key]

    def head(self, head: LMHead) -> LMHead:
        """Return the output head with a copied weight; one that is held in fewer bits stays as it is."""
        if not isinstance(head.weight, Tensor):
            return head
        if self._head is None or self._head.weight is not head.weight:
            with allocating(KIND):
                self._head = CopiedHead(head.weight, head.bias, head.softcap, head.scale, self._blocks(head.weight, head.bias))
        return self._head

    def _blocks(self, weight: Tensor, bias: Tensor | None) -> tuple[CopiedLinear, ...]:
        """Return copies of as many rows (words) each as make up `BLOCK`, so that little is there twice while one is ordered."""
        words = max(1, BLOCK // weight.shape[1])
        biases = [None] * len(weight.split(words)) if bias is None else bias.split(words)
        return tuple(CopiedLinear(w, b, self.rows) for w, b in zip(weight.split(words), biases, strict=True))


class MergedProjections:
    """Linear layers that read the same input, each with its adapter, as one product.

    Raises:
        LookupError: when the adapters in force are none that can be merged here.
    """

    def __init__(self, layers: Sequence[nn.Module], rows: int) -> None:
        weights = [merged(layer) for layer in layers]
        self.sizes = [len(weight) for weight in weights]
        biases = [_bias(layer) for layer in layers]
        bias = None
        if any(part is not None for part in biases):
            bias = torch.cat(
                [
                    weight.new_zeros(len(weight)) if part is None else part.to(weight.dtype)
                    for weight, part in zip(weights, biases, strict=True)
                ]
            )
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        self.linear = CopiedLinear(weight, bias, rows)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Return what each layer makes of x (B, I), its adapter's part included: (B, O)."""
        return self.linear(x).split(self.sizes, dim=-1)


@dataclass(frozen=True)
class CopiedHead(LMHead):
    """The same head by a copied weight, for a few rows."""

    copies: tuple[CopiedLinear, ...] = ()

    def product(self, hidden: Tensor) -> Tensor:
        return torch.cat([block(hidden) for block in self.copies], dim=-1)


@torch.no_grad()
def merged(layer: nn.Module) -> Tensor:
    """Return W + scaling * B A, (O, I) in bf16, of a layer with its active adapter; added in fp32, rounded once.

    Raises:
        LookupError: see `active_adapter`; or the layer is none whose weight is known here.
    """
    base, adapter = base_under(layer), active_adapter(layer)
    if base is None:
        raise LookupError
    weight = base.dense()
    if adapter is None:
        return weight.to(torch.bfloat16)
    return torch.addmm(weight.float(), adapter.b.float(), adapter.a.float(), alpha=adapter.scaling).to(torch.bfloat16)


def _bias(layer: nn.Module) -> Tensor | None:
    base = base_under(layer)
    return None if base is None else base.layer.bias
