"""The frozen half of a linear layer: its product, and that of its transpose which a backward pass needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hydra_ppo.compute.products import linear, linear_of_few, times


class Dense:
    """A linear layer whose weight is there as it is: `nn.Linear`, or GPT-2's Conv1D, which keeps it transposed."""

    def __init__(self, layer: nn.Linear | Conv1D, transposed: bool) -> None:
        self.layer = layer
        self.transposed = transposed

    @property
    def weight(self) -> Tensor:
        """(O, I)."""
        return self.layer.weight.T if self.transposed else self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    @property
    def trained(self) -> bool:
        """Whether the weight itself is trained."""
        return self.layer.weight.requires_grad

    def dense(self) -> Tensor:
        """Return the weight (O, I), here itself."""
        return self.weight

    def takes(self, x: Tensor) -> bool:
        """Return whether `product` computes what the layer itself would."""
        return self.takes_type(x.dtype) and not torch.is_autocast_enabled(x.device.type)

    def takes_type(self, dtype: torch.dtype) -> bool:
        """Return whether it takes inputs of this type outside of autocast."""
        return dtype == self.layer.weight.dtype and _untouched(self.layer)

    def product(self, x: Tensor) -> Tensor:
        """Return W x + b, (..., O), without a graph."""
        return linear(x, self.weight, self.bias)

    def product_of_few(self, x: Tensor) -> Tensor:
        """Return W x + b for a few rows x (N, I): (N, O), in any order of memory, without a graph."""
        y = linear_of_few(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Return W^T g, (..., I), in memory of its own."""
        return times(gradient, self.weight)


class FourBit:
    """A layer of bitsandbytes in nf4 or fp4. A product with the transpose holds the whole weight for a moment."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    weight = bias = None  # none that could be trained
    trained = False

    def takes(self, x: Tensor) -> bool:
        """Return whether `product` computes what the layer itself would."""
        return self.takes_type(x.dtype) and not torch.is_autocast_enabled(x.device.type)

    def takes_type(self, dtype: torch.dtype) -> bool:
        """Return whether it takes inputs of this type outside of autocast."""
        return dtype.is_floating_point and _untouched(self.layer)

    def product(self, x: Tensor) -> Tensor:
        """Return W x + b, (..., O), without a graph."""
        with torch.no_grad():
            return type(self.layer).forward(self.layer, x)

    product_of_few = product

    def dense(self) -> Tensor:
        """Return the weight (O, I) as it is multiplied, in memory of its own."""
        from bitsandbytes.functional import dequantize_4bit

        held = self.layer.weight
        # A weight that was gathered from several processes is plain bytes; the layer has kept how to read them.
        return dequantize_4bit(held.data, getattr(held, "quant_state", None) or self.layer.quant_state)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Return W^T g, (..., I), in memory of its own."""
        dtype = self.layer.compute_dtype or gradient.dtype
        return times(gradient.to(dtype), self.dense().to(dtype)).to(gradient.dtype)


Base = Dense | FourBit


def base_of(layer: nn.Module) -> Base | None:
    """Return the frozen half of a linear layer; None for one that can only run itself: in int8, or offloaded by accelerate."""
    if "forward" in vars(layer):
        return None
    if type(layer) is nn.Linear:
        return Dense(layer, transposed=False)
    if type(layer) is Conv1D:
        return Dense(layer, transposed=True)
    return FourBit(layer) if type(layer).__name__ == "Linear4bit" else None


def _untouched(layer: nn.Module) -> bool:
    """Return whether there are no hooks on the layer, which would not run."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
