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

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 64 * 2**20}
"""Size of one chunk of fp32 logits, by device. One such tensor is alive at a time, and an eighth beside it; with a gradient
of the entropy three.

A GPU reads the whole output head for each chunk, so it wants many rows. On a CPU the size hardly matters (measured, 1024
tokens of 32000, forward and backward on one thread: 64 MiB 1.04 s, 32 MiB 0.92 s, 16 MiB 1.00 s, 8 MiB 1.07 s)."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens, and of the distributions they came from the entropy and log sum exp of the
    scaled logits; in nats, fp32. The last has no gradient."""

    logprobs: Tensor
    entropy: Tensor
    log_norm: Tensor


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
        chunk_bytes: size of the largest fp32 temporary; that of `CHUNK_BYTES` when None.

    Returns:
        logprobs, entropy and log_norm, each (...), fp32 nats.

    Memory: saves N x H with a frozen head (2 N x H with `entropy_grad`), recomputes nothing; saves the N x H input
    and recomputes the logits by chunk with a trained one. A few chunks of `chunk_bytes` besides.
    """
    shape = tokens.shape
    flat, size = hidden.reshape(-1, hidden.shape[-1]), chunk_bytes or CHUNK_BYTES[hidden.device.type]
    with allocating("log-probs"):
        found = _TokenLogprobs.apply(
            flat, head.weight, head.bias, tokens.reshape(-1), head.softcap, temperature, entropy_grad, size
        )
    return TokenLogprobs(*(numbers.view(shape) for numbers in found))


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = LMHead(weight, bias, softcap)
        count = hidden.shape[0]
        logprobs = hidden.new_empty(count, dtype=torch.float32)
        entropy, log_norm = torch.empty_like(logprobs), torch.empty_like(logprobs)
        train_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = ctx.needs_input_grad[0] and not train_head
        d_logprob = torch.empty_like(hidden) if keep else None  # (N, H)
        d_entropy = torch.empty_like(hidden) if keep and entropy_grad else None  # (N, H)
        for rows in _chunks(count, weight.shape[0], chunk_bytes):
            part = _Chunk(head, hidden[rows], tokens[rows], temperature, entropy_grad)
            logprobs[rows] = part.logprobs
            entropy[rows] = part.entropy
            log_norm[rows] = part.log_norm
            if d_entropy is not None:
                d_entropy[rows] = part.to_hidden(part.entropy_gradient())
            if d_logprob is not None:
                d_logprob[rows] = part.to_hidden(part.logprob_gradient_())
            del part  # else its two chunks live on while the next ones are made
        ctx.train_head = train_head
        ctx.entropy_grad = entropy_grad
        if train_head:
            ctx.save_for_backward(hidden, weight, bias, tokens)
            ctx.constants = (softcap, temperature, chunk_bytes)
        elif keep:
            ctx.save_for_backward(d_logprob, d_entropy)
        ctx.mark_non_differentiable(log_norm, *(() if entropy_grad else (entropy,)))
        return logprobs, entropy, log_norm

    @staticmethod
    @allocating("log-probs")
    def backward(ctx: Any, g_logprob: Tensor, g_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
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
        part = _Chunk(head, hidden[rows], tokens[rows], temperature, ctx.entropy_grad)
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
        del part, entropy_part, g_raw
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


BLOCKS = 8
"""A chunk's logits become probabilities in place, this many blocks of rows one after the other."""


class _Chunk:
    """Distribution of a few rows: (n, V) probabilities, and gradients with respect to the raw logits.

    Args:
        keep_log_p: keep log-probabilities beside the probabilities, which the gradient of the entropy needs.
    """

    def __init__(self, head: LMHead, hidden: Tensor, tokens: Tensor, temperature: float, keep_log_p: bool) -> None:
        self.head = head
        self.tokens = tokens[:, None]
        self.temperature = temperature
        logits = head.logits(hidden, temperature)  # (n, V)
        self._slope = None if head.softcap is None else 1 - (logits * (temperature / head.softcap)).square_()
        chosen = logits.gather(1, self.tokens)[:, 0]
        self.log_norm, self.entropy = torch.empty_like(chosen), torch.empty_like(chosen)
        self._p = torch.empty_like(logits) if keep_log_p else logits
        self._log_p = logits if keep_log_p else None
        for rows in _blocks(len(logits), BLOCKS):
            self.log_norm[rows] = logits[rows].logsumexp(dim=-1)
            log_p = logits[rows].sub_(self.log_norm[rows, None])
            p = log_p.exp()
            # A row times a column each: the sum of their product without the product itself.
            self.entropy[rows] = -torch.bmm(p[:, None, :], log_p[:, :, None])[:, 0, 0]
            self._p[rows] = p
        self.logprobs = chosen - self.log_norm

    def entropy_gradient(self) -> Tensor:
        """Return d entropy / d raw logits = -p (log p + entropy) D, (n, V)."""
        assert self._log_p is not None
        return self._through_cap((self._log_p + self.entropy[:, None]).mul_(self._p).neg_())

    def logprob_gradient_(self) -> Tensor:
        """Return d log p(token) / d raw logits = (e_token - p) D, (n, V); the last call: it takes the buffer of p."""
        self._log_p = None
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
    return _slices(count, max(1, chunk_bytes // (4 * vocabulary)))


def _blocks(count: int, number: int) -> list[slice]:
    return _slices(count, max(1, -(-count // number)))


def _slices(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
