"""Log-probabilities and entropy straight from hidden states, in vocabulary-safe chunks.

The gradient of a token's log-probability with respect to its hidden state,

    d log p(a) / d h = W^T D (e_a - p),      D = d(scaled logits) / d(raw logits),

needs only the probabilities that the forward pass has in its hands anyway. While the head is frozen, as it is
throughout PPO, it is therefore computed there and kept: N x H numbers instead of N x V, and the backward pass is
one multiplication. Where the head itself is trained (full fine-tuning) the chunks are computed again instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_ppo.announce import allocating

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of fp32 logits. About five such tensors are alive at once (measured: 319 MiB for 512 tokens of 128256)."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens and the entropy of the distributions they came from, in nats, fp32."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LMHead:
    """What turns hidden states into logits: logits = softcap * tanh((W h + b) / softcap), softcap None is plain.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: bound of the logits (`final_logit_softcapping` in Hugging Face configs) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    @torch.no_grad()
    @allocating("log-probs")
    def logits(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Return fp32 logits (..., V) divided by `temperature`, without a graph. Memory: all of them; for few rows only."""
        raw = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.softcap is not None:
            raw = raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw.div_(temperature) if temperature != 1.0 else raw


def token_logprobs(
    hidden: Tensor,
    tokens: Tensor,
    head: LMHead,
    *,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """Compute log-probabilities of `tokens` and entropies without a tensor of size N x V.

    Args:
        hidden: (..., H) final hidden states, after the model's last norm.
        tokens: (...) token ids in [0, V).
        head: the output head; its weight may require gradients.
        temperature: divides the logits.
        entropy_grad: let gradients flow through the entropy as well as through the log-probabilities.
        chunk_bytes: size of the largest fp32 temporary; `CHUNK_BYTES` when None.

    Returns:
        logprobs (...) and entropy (...), fp32 nats.

    Memory: saves N x H with a frozen head (2 N x H with `entropy_grad`), recomputes nothing; saves the N x H input
    and recomputes the logits by chunk with a trained one. A few chunks of `chunk_bytes` besides.
    """
    shape = tokens.shape
    flat, size = hidden.reshape(-1, hidden.shape[-1]), chunk_bytes or CHUNK_BYTES
    with allocating("log-probs"):
        logprobs, entropy = _TokenLogprobs.apply(
            flat, head.weight, head.bias, tokens.reshape(-1), head.softcap, temperature, entropy_grad, size
        )
    return TokenLogprobs(logprobs.view(shape), entropy.view(shape))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        softcap: float | None,
        temperature: float,
        entropy_grad: bool,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        head = LMHead(weight, bias, softcap)
        count = hidden.shape[0]
        logprobs = hidden.new_empty(count, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        train_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = ctx.needs_input_grad[0] and not train_head
        d_logprob = torch.empty_like(hidden) if keep else None  # (N, H)
        d_entropy = torch.empty_like(hidden) if keep and entropy_grad else None  # (N, H)
        for rows in _chunks(count, weight.shape[0], chunk_bytes):
            part = _Chunk(head, hidden[rows], tokens[rows], temperature)
            logprobs[rows] = part.logprobs
            entropy[rows] = part.entropy
            if d_entropy is not None:
                d_entropy[rows] = part.to_hidden(part.entropy_gradient())
            if d_logprob is not None:
                d_logprob[rows] = part.to_hidden(part.logprob_gradient_())
        ctx.train_head = train_head
        ctx.entropy_grad = entropy_grad
        if train_head:
            ctx.save_for_backward(hidden, weight, bias, tokens)
            ctx.constants = (softcap, temperature, chunk_bytes)
        elif keep:
            ctx.save_for_backward(d_logprob, d_entropy)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @allocating("log-probs")
    def backward(ctx: Any, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.train_head:
            return (*_recompute_gradients(ctx, g_logprob, g_entropy), None, None, None, None, None)
        d_logprob, d_entropy = ctx.saved_tensors
        grad = (d_logprob * g_logprob[:, None]).to(d_logprob.dtype)
        if d_entropy is not None:
            grad = grad + (d_entropy * g_entropy[:, None]).to(grad.dtype)
        return grad, None, None, None, None, None, None, None


def _recompute_gradients(ctx: Any, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for a trained head: one more pass over the chunks, accumulating (V, H) in fp32."""
    hidden, weight, bias, tokens = ctx.saved_tensors
    softcap, temperature, chunk_bytes = ctx.constants
    head = LMHead(weight, bias, softcap)
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
    for rows in _chunks(hidden.shape[0], weight.shape[0], chunk_bytes):
        part = _Chunk(head, hidden[rows], tokens[rows], temperature)
        entropy_part = part.entropy_gradient().mul_(g_entropy[rows, None]) if ctx.entropy_grad else None
        g_raw = part.logprob_gradient_().mul_(g_logprob[rows, None])  # (n, V)
        if entropy_part is not None:
            g_raw += entropy_part
        if grad_hidden is not None:
            grad_hidden[rows] = part.to_hidden(g_raw)
        if grad_weight is not None:
            grad_weight.addmm_(g_raw.T, hidden[rows].float())
        if grad_bias is not None:
            grad_bias += g_raw.sum(dim=0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


class _Chunk:
    """Distribution of a few rows: (n, V) scaled logits, and gradients with respect to the raw ones."""

    def __init__(self, head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float) -> None:
        self.head = head
        self.tokens = tokens[:, None]
        self.temperature = temperature
        logits = head.logits(hidden, temperature)  # (n, V)
        self._slope = None if head.softcap is None else 1 - (logits * (temperature / head.softcap)).square_()
        log_norm = logits.logsumexp(dim=-1, keepdim=True)
        self.logprobs = (logits.gather(1, self.tokens) - log_norm)[:, 0]
        # In place from here on: the (n, V) buffer becomes log-probabilities.
        self._log_p = logits.sub_(log_norm)
        p = self._log_p.exp()
        self.entropy = -torch.linalg.vecdot(p, self._log_p)
        self._p = p

    def entropy_gradient(self) -> Tensor:
        """Return d entropy / d raw logits = -p (log p + entropy) D, (n, V)."""
        return self._through_cap((self._log_p + self.entropy[:, None]).mul_(self._p).neg_())

    def logprob_gradient_(self) -> Tensor:
        """Return d log p(token) / d raw logits = (e_token - p) D, (n, V); reuses the buffer of p."""
        gradient = self._p.neg_()
        gradient.scatter_add_(1, self.tokens, torch.ones_like(self.tokens, dtype=gradient.dtype))
        return self._through_cap(gradient)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """Carry a gradient (n, V) with respect to raw logits over to the hidden states, (n, H)."""
        return gradient.to(self.head.weight.dtype) @ self.head.weight

    def _through_cap(self, gradient: Tensor) -> Tensor:
        if self._slope is not None:  # tanh' = 1 - tanh²
            gradient = gradient.mul_(self._slope)
        return gradient.div_(self.temperature)


def _chunks(count: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    rows = max(1, chunk_bytes // (4 * vocabulary))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
