"""Matrix products with frozen weights, each by the fastest kernel that torch has for it.

torch hands fp32 products on x86 to MKL, which on an AMD processor uses half of its vector width, and is slow everywhere on a
few rows (a decoding step). oneDNN, in the same build, has neither trouble. Measured on a 2-core AMD EPYC with AVX-512, in
GFLOP/s, MKL and oneDNN: 384 x 512 by 512 x 1536: 187, 402; 16 x 512 by 512 x 1536 read from memory: 74, 124; 16 x 512 by
512 x 32000: 70, 163. Both are plain fp32 and differ in the order of their sums. Half-precision products and those of other
devices go where torch sends them.

The functions have no gradient of their own; they are for `torch.no_grad` and the inside of autograd functions.
`torch.backends.mkldnn.flags(enabled=False)` gives torch's own choice everywhere.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_X86 = platform.machine().lower() in ("x86_64", "amd64")


SMALL = 2**21
"""Multiply-adds below which torch's own choice is taken. oneDNN compiles a kernel for every shape that it meets, and keeps
a thousand: 0.5 ms and tens of KiB each, measured, which small products never earn back (0.07 M multiply-adds: 14 us, MKL 4 us;
4 M: 57 us, MKL 72 us). On a tiny model with responses of all lengths that made resident memory grow for 300 steps."""


def has_own_kernel(tensor: Tensor) -> bool:
    """Return whether products of tensors like this one go to another kernel than torch would take."""
    return (
        _ONEDNN is not None
        and _X86
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def multiplies_bf16() -> bool:
    """Return whether oneDNN multiplies bf16 on this processor; else torch does it by itself, slowly."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if torch.backends.mkldnn.is_available() else None
    return supported is not None and bool(supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., O) for x (..., I), W (O, I), b (O,), all of one dtype."""
    if x.numel() * weight.shape[0] >= SMALL and has_own_kernel(x):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def linear_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (N, O) for a few rows x (N, I), in memory column by column where that is faster.

    With few rows the time goes into reading W, and as the left factor oneDNN reads it as it lies: 16 rows by 100 MB of weights
    took 5.1 ms against 6.9. In bf16, which goes where torch sends it, that was slower (4.7 ms against 3.5).
    """
    if x.numel() * weight.shape[0] >= SMALL and has_own_kernel(x):
        return _ONEDNN(weight, x, None, "none", [], "").T
    return torch.nn.functional.linear(x, weight)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x M (..., O) for x (..., I), M (I, O)."""
    return linear(x, matrix.T)
