"""Copies of linear layers that are read as fast as the machine can: for products with few rows, such as a decoding step's.

There the time goes into reading weights. oneDNN reads a bf16 weight fastest in an order of its own, which it has to be brought
into first; a layer that is multiplied hundreds of times before it changes earns that back. On a GPU, and where torch has no
such order, the copy is a plain bf16 matrix.

Measured on 2 threads of an AMD EPYC with AVX512-BF16, 16 rows, us in fp32 by oneDNN, in plain and in ordered bf16:
512 x 1536 209, 187, 100; 512 x 32000 7358, 4420, 1641.

Memory: 2 bytes a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compute.products import multiplies_bf16

_OPS = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_ORDER: Any = getattr(_OPS, "_reorder_linear_weight", None)
_PRODUCT: Any = getattr(_OPS, "_linear_pointwise", None)


class CopiedLinear:
    """W x + b of a copied W.

    Args:
        weight: (O, I), of any floating type; it is rounded to bf16.
        bias: (O,) or None.
        rows: that will be multiplied at once, about.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight = weight.to(torch.bfloat16)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.ordered = can_be_ordered(self.weight)
        if self.ordered:
            self.weight = _ORDER(self.weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (N, O) in the type of x (N, I)."""
        y = x.to(torch.bfloat16)
        if self.ordered:
            return _PRODUCT(y, self.weight, self.bias, "none", [], "").to(x.dtype)
        return torch.nn.functional.linear(y, self.weight, self.bias).to(x.dtype)


def can_be_ordered(weight: Tensor) -> bool:
    """Return whether oneDNN has an order of its own for this weight: on a CPU that multiplies bf16, and real numbers."""
    return (
        _ORDER is not None
        and _PRODUCT is not None
        and weight.device.type == "cpu"
        and type(weight) in (Tensor, torch.nn.Parameter)
        and bool(torch.backends.mkldnn.enabled)
        and multiplies_bf16()
    )
