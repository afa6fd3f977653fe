"""Rounding to int8 with a scale for the numbers of a last dimension: x is round(x / s) times s, with s = max |x| / 127.

The scale is of the compute type, and x is divided by it as it is held, so that rounding it costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127
"""The largest code; -128 is not used, so that x and -x have codes alike."""

SMALLEST = {torch.float16: 2.0**-16}
"""The smallest scale where it is not the type's smallest normal number. fp16 has steps of 2^-24 there: half of one is 0.2% of
this scale, and a quotient of 127.25 is still a code of 127."""


def quantise(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return codes (..., D) int8 and scales (..., 1) of x (..., D); one entry not finite, and no scale is.

    Args:
        dtype: of the scales; that of `x` where None.

    Memory: x once more in fp32, for the moment.
    """
    dtype = dtype or x.dtype
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scales = largest.div_(LEVELS).to(dtype).clamp_(min=SMALLEST.get(dtype, torch.finfo(dtype).tiny))
    return torch.div(x, scales.float()).round_().to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """Return (..., D) in the type of the scales (..., 1): entries are off by half a scale at most, and by that type's rounding.

    Memory: the result.
    """
    if codes.device.type == "cuda":
        return codes * scales  # one kernel; on a CPU it takes up to twice as long as a cast and a product in place
    return codes.to(scales.dtype).mul_(scales)
