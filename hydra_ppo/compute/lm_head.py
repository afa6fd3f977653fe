"""The output head as tensors: from hidden states to logits, whole or for a block of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hydra_ppo.compute.products import linear, times
from hydra_ppo.compute.quantized_rows import BLOCK_BYTES, QuantizedRows
from hydra_ppo.runtime.announce import allocating


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: logits = softcap * tanh(scale * (W h + b) / softcap), softcap None is plain.

    Attributes:
        weight: (V, H), or the same in 8 or 4 bits, frozen.
        bias: (V,) or None.
        softcap: bound of the logits (`final_logit_softcapping` in Hugging Face configs) or None.
        scale: what the model multiplies its logits with (`logit_scale` of Cohere, one over `logits_scaling` of Granite).
    """

    weight: Tensor | QuantizedRows
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def unscaled(self, temperature: float) -> tuple[LMHead, float]:
        """Return a head without a scale, and the temperature at which it gives the same: s r / T is r / (T / s), and a cap of
        c on s r one of c / s on r."""
        if self.scale == 1.0:
            return self, temperature
        softcap = None if self.softcap is None else self.softcap / self.scale
        return LMHead(self.weight, self.bias, softcap), temperature / self.scale

    @torch.no_grad()
    @allocating("log-probs")
    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Return fp32 logits (..., V) divided by `temperature`, without a graph. Memory: all of them; for few rows only."""
        if isinstance(self.weight, QuantizedRows):
            found = hidden.new_empty((*hidden.shape[:-1], len(self.weight)), dtype=torch.float32)
            for columns in self.weight.blocks(BLOCK_BYTES):
                found[..., columns] = self.block(columns).logits(hidden, temperature)
            return found
        raw = self.product(hidden).float()
        head, temperature = self.unscaled(temperature)
        if head.softcap is not None:
            raw = raw.div_(head.softcap).tanh_().mul_(head.softcap)
        return raw.div_(temperature) if temperature != 1.0 else raw

    def product(self, hidden: Tensor) -> Tensor:
        """Return W h + b, (..., V), of a head that is there in the compute type, without a graph."""
        assert isinstance(self.weight, Tensor)
        return linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def raw(self, hidden: Tensor) -> Tensor:
        """Return W h + b, (..., V) in fp32, differentiable with respect to `hidden`. Memory: all of them."""
        if not isinstance(self.weight, QuantizedRows):
            return functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        # Each block once more in the backward pass, so that the graph keeps none of them.
        blocks = [checkpoint(self._raw_block, hidden, part, use_reentrant=False) for part in self.weight.blocks(BLOCK_BYTES)]
        return torch.cat(blocks, dim=-1)

    def _raw_block(self, hidden: Tensor, columns: slice) -> Tensor:
        return self.block(columns).raw(hidden)

    def check(self, tokens: Tensor) -> None:
        """Raise IndexError where a token (N,) is none of the vocabulary; on a GPU the error is the device's own."""
        held = self.weight.scales if isinstance(self.weight, QuantizedRows) else self.weight
        held[:, 0].gather(0, tokens)

    def most_columns(self, size: int) -> int | None:
        """Return how many words of a quantised head take `size` bytes in the compute type; None of one that is there anyway."""
        return self.weight.rows_of(size) if isinstance(self.weight, QuantizedRows) else None

    def block(self, columns: slice) -> LMHead:
        """Return the head of these words of the vocabulary only, without a copy; of a quantised one in the compute type."""
        return LMHead(self.weight[columns], None if self.bias is None else self.bias[columns], self.softcap, self.scale)

    def slope(self, logits: Tensor, temperature: float) -> Tensor | None:
        """Return d(temperature * logits) / d(raw logits), of the shape of `logits`; None where it is 1 throughout."""
        if self.softcap is None:
            return None
        return (logits * (temperature / self.softcap)).square_().neg_().add_(1.0)  # tanh' = 1 - tanh²

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """Carry a gradient (n, V) with respect to raw logits over to the hidden states, (n, H) fp32."""
        weight = self.weight
        assert isinstance(weight, Tensor)  # of a block, as all are that gradients go through
        return times(gradient.to(weight.dtype), weight).float()
