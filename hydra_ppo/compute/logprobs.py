"""Log-probabilities and entropy straight from hidden states, one block of the vocabulary at a time.

No tensor of size N x V is made. The rows meet the output head block by block, as the queries of flash-attention (Dao et al.
2022, arXiv 2205.14135) meet the keys, and what stays of the blocks seen so far are a few numbers of the distribution p over
them. Where a new block, with a distribution of its own, holds the share w = Z_block / (Z + Z_block) of all that was seen, then

    H  <-  (1 - w) H + w H_block - w log w - (1 - w) log (1 - w)        the chain rule of the entropy,
    M  <-  (1 - w) M + w M_block                                        M = sum_v p_v D_v W_v,

with D = d(scaled logit) / d(raw logit), which makes the gradient of a token's log-probability

    d log p_a / d h = D_a W_a - M

known at the end of the one pass, and in the same way that of the entropy, d H / d h = -sum_v p_v (log p_v + H) D_v W_v.
While the head is frozen, as it is throughout PPO, the forward pass therefore computes and keeps them: N x H numbers instead
of N x V, and the backward pass is one multiplication. Where the head itself is trained (full fine-tuning) the backward pass
goes through the blocks once more, with Z and H known.

The token's own term stays out of the sums and is put in at the end, as D_a W_a (1 - p_a): as the difference of two sums the
small gradient of a probable token would drown in rounding, with a half-precision head above all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.products import times
from hydra_ppo.compute.quantized_rows import QuantizedRows
from hydra_ppo.runtime.announce import allocating

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
"""What the temporaries of one block may take, by device: its fp32 logits and probabilities, and the rows' sums, of size N x H,
with what is added to them. A softcap takes half as much again, casting to half precision for the gradient of the entropy a
quarter.

Measured on one core of an AMD EPYC (1 MiB of L2 cache), H = 512 in fp32, ms of processor time for log-probs with their
gradient, and without:

    N     V          1 MiB       2 MiB       4 MiB       8 MiB      16 MiB      32 MiB
    256   32000     131   68    110   58    102   55     99   53     98   52    117   52
    1024  32000     517  275    455  227    407  206    402  220    394  211    505  332
    256   128256    509  274    453  234    397  205    384  206    389  208    502  223
    1024  128256   2191 1079   1736  909   1755  895   1635  875   1628  922   2113  841

That of a GPU, which wants fewer and larger kernels, is not measured."""

NARROWEST = 1024
"""Fewest columns of a block where the vocabulary has them: the sums of the rows are read and written once for each block. Rows
that do not fit are left to another pass over the vocabulary."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens, and of the distributions they came from the entropy and log sum exp of the
    scaled logits; in nats, fp32. The last has no gradient."""

    logprobs: Tensor
    entropy: Tensor
    log_norm: Tensor


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
        chunk_bytes: what the temporaries of one block of the vocabulary may take; that of `CHUNK_BYTES` when None.

    Returns:
        logprobs, entropy and log_norm, each (...), fp32 nats.

    Raises:
        IndexError: a token outside of [0, V); on a GPU the error is the device's own.

    Memory: saves N x H with a frozen head (2 N x H with `entropy_grad`), recomputes nothing; saves the N x H input
    and recomputes the logits by block with a trained one. `chunk_bytes` besides, whatever V is; of a quantised head as much
    again, a block in the compute type. Without a gradient
    there is one matrix product and nothing of size N x H.
    """
    head, temperature = head.unscaled(temperature)
    shape = tokens.shape
    flat, size = hidden.reshape(-1, hidden.shape[-1]), chunk_bytes or CHUNK_BYTES[hidden.device.type]
    if not torch.is_grad_enabled():  # an autograd function is told that its input wants a gradient even so
        flat = flat.detach()
    with allocating("log-probs"):
        found = _token_logprobs(flat, head.weight, head.bias, tokens.reshape(-1), head.softcap, temperature, entropy_grad, size)
    return TokenLogprobs(*(numbers.view(shape) for numbers in found))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | QuantizedRows,
        bias: Tensor | None,
        tokens: Tensor,
        softcap: float | None,
        temperature: float,
        entropy_grad: bool,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = LMHead(weight, bias, softcap)
        head.check(tokens)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy, log_norm = torch.empty_like(logprobs), torch.empty_like(logprobs)
        train_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = ctx.needs_input_grad[0] and not train_head
        d_logprob = torch.empty_like(hidden) if keep else None  # (N, H)
        d_entropy = torch.empty_like(hidden) if keep and entropy_grad else None  # (N, H)
        groups, blocks = _cut(
            hidden.shape[0], hidden.shape[1], weight.shape[0], chunk_bytes, most=head.most_columns(chunk_bytes)
        )
        for rows in groups:
            seen = _Seen(head, hidden[rows], tokens[rows], temperature, keep, keep and entropy_grad)
            for columns in blocks:
                seen.add(columns)
            logprobs[rows], entropy[rows], log_norm[rows] = seen.numbers()
            if d_logprob is not None:
                d_logprob[rows] = seen.logprob_gradient()
            if d_entropy is not None:
                d_entropy[rows] = seen.entropy_gradient()
        ctx.train_head = train_head
        ctx.entropy_grad = entropy_grad
        if train_head:
            ctx.save_for_backward(hidden, weight, bias, tokens, log_norm, entropy if entropy_grad else None)
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


_token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = _TokenLogprobs.apply  # which torch gives no types


class _Seen:
    """Some rows and what is known of them from the blocks of the vocabulary seen so far.

    Args:
        head: the whole output head.
        hidden: (n, H).
        tokens: (n,).
        temperature: divides the logits.
        keep_logprob: sum up what the gradient of the log-probabilities takes, (n, H) fp32.
        keep_entropy: likewise for that of the entropy; only together with the former.
    """

    def __init__(
        self,
        head: LMHead,
        hidden: Tensor,
        tokens: Tensor,
        temperature: float,
        keep_logprob: bool,
        keep_entropy: bool,
    ) -> None:
        self.head = head
        self.hidden = hidden.to(head.weight.dtype)
        self.tokens = tokens[:, None]
        self.temperature = temperature
        self._chosen = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)  # logit of the token
        # A number a row costs nothing in double precision, and rounding after each of a hundred blocks would show in fp32.
        self._log_norm = torch.full_like(self._chosen, torch.finfo(torch.float32).min, dtype=torch.float64)
        self._entropy = torch.zeros_like(self._log_norm)
        # Sums over all words but the token, of p D W and of p (log p + entropy) D W, (n, H).
        self._mean = torch.zeros_like(hidden, dtype=torch.float32) if keep_logprob else None
        self._deviation = torch.zeros_like(hidden, dtype=torch.float32) if keep_entropy else None

    def add(self, columns: slice) -> None:
        """Take in the next block of the vocabulary."""
        head = self.head.block(columns)
        logits = head.logits(self.hidden, self.temperature)  # (n, C)
        at, inside = _find(self.tokens, columns)
        self._chosen = torch.where(inside, logits.gather(1, at), self._chosen)
        slope = None if self._mean is None else head.slope(logits, self.temperature)
        # In one call softmax takes half the time of max, exp and sum, and leaves the norm as the largest probability's inverse.
        # Kernels that sum a long row in one go miss it by a little: `total` is not quite 1 then and puts that right.
        p = logits.softmax(dim=-1)
        total = p.sum(dim=-1, keepdim=True).double()
        log_norm = logits.amax(dim=-1, keepdim=True) + (total / p.amax(dim=-1, keepdim=True)).log_()
        p_log_p = logits.sub_(log_norm.float()).mul_(p)
        del logits
        entropy = -p_log_p.sum(dim=-1, keepdim=True) / total
        before, share = torch.sigmoid(self._log_norm - log_norm), torch.sigmoid(log_norm - self._log_norm)
        choice_before, choice = torch.special.entr(before), torch.special.entr(share)
        merged = before * self._entropy + share * entropy + choice_before + choice
        if self._mean is not None:
            if self._deviation is not None:
                deviation = _without_(p_log_p.addcmul_(p, entropy.float()), at, inside, slope)
            del p_log_p
            mean = head.to_hidden(_without_(p, at, inside, slope))  # (n, H)
            del p, slope
            if self._deviation is not None:
                # log p is less than it was in either part, by log(before) or log(share), and so is the entropy another.
                _mix_(self._deviation, before, head.to_hidden(deviation), share / total)
                self._deviation.addcmul_(self._mean, (before * (merged - self._entropy) - choice_before).float())
                self._deviation.addcmul_(mean, ((share * (merged - entropy) - choice) / total).float())
            _mix_(self._mean, before, mean, share / total)
        self._log_norm, self._entropy = torch.logaddexp(self._log_norm, log_norm), merged

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return logprobs, entropy and log_norm, each (n,) fp32, once all blocks were added."""
        return self._logprobs()[:, 0].float(), self._entropy[:, 0].float(), self._log_norm[:, 0].float()

    def logprob_gradient(self) -> Tensor:
        """Return d logprobs / d hidden, (n, H) fp32, once all blocks were added."""
        return self._to_hidden(-torch.expm1(self._logprobs()), self._mean)

    def entropy_gradient(self) -> Tensor:
        """Return d entropy / d hidden, (n, H) fp32, once all blocks were added."""
        logprobs = self._logprobs()
        return self._to_hidden(-logprobs.exp() * (logprobs + self._entropy), self._deviation)

    def _logprobs(self) -> Tensor:
        return self._chosen - self._log_norm

    def _to_hidden(self, own: Tensor, others: Tensor | None) -> Tensor:
        """Return (own D W of the token - others) / temperature, for `own` (n, 1) and `others` (n, H)."""
        assert others is not None
        slope = self.head.slope(self._chosen, self.temperature)
        factor = own if slope is None else own * slope
        rows = self.head.weight[self.tokens[:, 0]].float()  # (n, H)
        return rows.mul_(factor.float()).sub_(others).div_(self.temperature)


def _recompute_gradients(ctx: Any, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for a trained head: one more pass over the blocks, after each of which its part of the head is done."""
    hidden, weight, bias, tokens, log_norm, entropy = ctx.saved_tensors
    softcap, temperature, chunk_bytes = ctx.constants
    head = LMHead(weight, bias, softcap)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
    grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
    own = torch.zeros_like(log_norm)  # gradient of the token's raw logit, kept out of the sum as in the forward pass
    groups, blocks = _cut(hidden.shape[0], hidden.shape[1], weight.shape[0], chunk_bytes, train_head=True)
    for columns in blocks:
        part = head.block(columns)
        d_weight = d_bias = None
        for rows in groups:
            logits = part.logits(hidden[rows], temperature)  # (n, C)
            slope = part.slope(logits, temperature)
            at, inside = _find(tokens[rows, None], columns)
            log_p = logits.sub_(log_norm[rows, None])
            to_token = g_logprob[rows, None] / temperature
            if entropy is None:
                g_raw = log_p.exp_().mul_(-to_token)
            else:  # p (-(log p + entropy) g_entropy - g_logprob)
                to_entropy = g_entropy[rows, None] / temperature
                p = log_p.exp()
                g_raw = log_p.add_(entropy[rows, None]).mul_(-to_entropy).sub_(to_token).mul_(p)
                del p
            g_raw.scatter_add_(1, at, to_token * inside)
            if slope is not None:
                g_raw.mul_(slope)
            if grad_weight is not None:
                d_weight = _plus(d_weight, times(g_raw.T, hidden[rows].float()))  # (C, H)
            if grad_bias is not None:
                d_bias = _plus(d_bias, g_raw.sum(dim=0))
            if grad_hidden is not None:
                own[rows] += (g_raw.gather(1, at) * inside)[:, 0]
                grad_hidden[rows] += part.to_hidden(_without_(g_raw, at, inside, None))
            del logits, log_p, slope, g_raw  # else they live on while the next ones are made
        if grad_weight is not None and d_weight is not None:
            grad_weight[columns] = d_weight
        if grad_bias is not None and d_bias is not None:
            grad_bias[columns] = d_bias
    if grad_hidden is None:
        return None, grad_weight, grad_bias
    return grad_hidden.addcmul_(weight[tokens].float(), own[:, None]).to(hidden.dtype), grad_weight, grad_bias


def _find(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return where in a block tokens (n, 1) are and whether they are in it at all, both (n, 1)."""
    inside = (tokens >= columns.start) & (tokens < columns.stop)
    return (tokens - columns.start).clamp_(0, columns.stop - columns.start - 1), inside


def _without_(block: Tensor, at: Tensor, inside: Tensor, slope: Tensor | None) -> Tensor:
    """Return a block (n, C) with 0 at the tokens inside of it, times the slope; in place."""
    block.scatter_(1, at, block.gather(1, at).masked_fill_(inside, 0.0))
    return block if slope is None else block.mul_(slope)


def _plus(total: Tensor | None, new: Tensor) -> Tensor:
    return new if total is None else total.add_(new)


def _mix_(sums: Tensor, keep: Tensor, new: Tensor, share: Tensor) -> Tensor:
    """Return keep * sums + share * new in place, sums and new (n, H), keep and share (n, 1)."""
    return sums.mul_(keep.float()).addcmul_(new, share.float())


def _cut(
    count: int, width: int, vocabulary: int, chunk_bytes: int, train_head: bool = False, most: int | None = None
) -> tuple[list[slice], list[slice]]:
    """Cut N rows and V columns so that the temporaries of one block, all fp32, take `chunk_bytes`.

    Two numbers a row and column, of the logits and the probabilities; two a row and hidden unit, of the sums and of what is
    added to them; with `train_head` two a column and hidden unit as well, which may take as much again. `most` bounds the
    columns where each block of the head is made for the purpose.
    """
    numbers = chunk_bytes // 8
    narrow = min(vocabulary, NARROWEST)
    most_rows = max(1, numbers // (narrow + width))
    rows = -(-count // -(-count // most_rows)) if count else 1  # groups of one size
    columns = numbers // rows - width
    if train_head:
        columns = min(columns, numbers // width)
    if most is not None:
        columns = min(columns, most)
    columns = max(narrow, columns - columns % 64)
    return _slices(count, rows), _slices(vocabulary, columns)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
