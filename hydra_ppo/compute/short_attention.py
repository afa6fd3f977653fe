"""Causal attention on short rows in bf16 on a CPU, where torch's own kernel is slow, above all backward.

torch's fused kernel multiplies small tiles, which its bf16 products cannot use. Here a block of queries meets all keys that it
sees in one batched product. Scores and softmax are in fp32, as in the fused kernel; what leaves them is rounded once.

Measured on 2 threads of an AMD EPYC with AVX512-BF16, freed memory kept as in a run: ms of a forward pass, and of one with its
backward pass, by torch's kernel and by this one:

    rows, tokens, heads of queries, of keys    torch's        this
    4, 96, 8, 4                                1.0, 7.5       1.1, 4.6
    16, 64, 9, 3                               2.7, 19.3      1.7, 5.5
    2, 512, 4, 4                               4.0, 13.4      3.5, 11.7
    1, 1024, 8, 2                              13, 39         14, 40

In fp32 torch's is as fast. Against fp64 the gradients of keys and values are nearer than the fused kernel's (2.9e-3 for 3.8e-3
of their norm), the output a little further (2.2e-3 for 1.9e-3).

Memory: saves queries, keys and values, and neither output nor logarithms; below `AT_ONCE` scores at a time, 18 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from hydra_ppo.compute.products import multiplies_bf16

LONGEST = 768
"""Tokens of a row up to which this is used."""
BLOCK = 128
"""Queries that meet the same keys: a longer block computes more scores that causality leaves out."""
AT_ONCE = 2**18


def wins(dtype: torch.dtype, device: torch.device, tokens: int) -> bool:
    """Return whether this is the faster way for rows of so many tokens."""
    return (
        device.type == "cpu"
        and dtype is torch.bfloat16
        and tokens <= LONGEST
        and multiplies_bf16()
        and detect_fake_mode() is None  # a simulation is one of a GPU
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")  # which would round the scores
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Return softmax(scaling * q k^T) v under a causal mask, (B, heads, T, D).

    Args:
        query: (B, heads, T, D); key, value: (B, key-value heads, T, D); neighbouring heads share theirs.
        scaling: None is 1 / sqrt(D).
    """
    return _attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


class _Attend(torch.autograd.Function):
    """Recomputes the weights in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        q, k, v = _by_group(query, key, value)
        out = torch.empty_like(q)
        for heads, rows, mask in _pieces(q):
            weights = _weights(q[heads, :, rows], k[heads, : rows.stop], scaling, mask).to(v.dtype)
            out[heads, :, rows] = torch.bmm(weights.flatten(1, 2), v[heads, : rows.stop]).unflatten(1, weights.shape[1:3])
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        q, k, v = _by_group(query, key, value)
        g = gradient.reshape(q.shape)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for heads, rows, mask in _pieces(q):
            seen = slice(0, rows.stop)
            weights = _weights(q[heads, :, rows], k[heads, seen], ctx.scaling, mask)
            g_rows = g[heads, :, rows].flatten(1, 2)
            d_v[heads, seen] += torch.bmm(weights.to(v.dtype).flatten(1, 2).transpose(1, 2), g_rows)
            d_weights = torch.bmm(g_rows, v[heads, seen].transpose(1, 2)).float().view(weights.shape)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores = d_scores.mul_(ctx.scaling).to(q.dtype).flatten(1, 2)
            del d_weights, weights
            d_q[heads, :, rows] = torch.bmm(d_scores, k[heads, seen]).unflatten(1, (q.shape[1], -1))
            d_k[heads, seen] += torch.bmm(d_scores.transpose(1, 2), q[heads, :, rows].flatten(1, 2))
        return d_q.view(query.shape), d_k.view(key.shape), d_v.view(value.shape), None


_attend: Callable[..., Tensor] = _Attend.apply  # which torch gives no types


def _by_group(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B * key-value heads, group, T, D), keys and values (B * key-value heads, T, D)."""
    rows, heads, tokens, width = query.shape
    pairs = rows * key.shape[1]
    shared = (pairs, tokens, width)
    return query.reshape(pairs, heads // key.shape[1], tokens, width), key.reshape(shared), value.reshape(shared)


def _pieces(query: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield which key-value heads and which queries come next, and (block, block) -inf where a query is before a key."""
    pairs, group, tokens, _ = query.shape
    for start in range(0, tokens, BLOCK):
        rows = slice(start, min(start + BLOCK, tokens))
        length = rows.stop - start
        mask = torch.full((length, length), -torch.inf, device=query.device).triu_(1)
        together = max(1, AT_ONCE // (group * length * rows.stop))
        for pair in range(0, pairs, together):
            yield slice(pair, pair + together), rows, mask


def _weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor) -> Tensor:
    """Return fp32 weights (n, group, block, S) of queries (n, group, block, D), of keys (n, S, D) the last `block` masked."""
    _, group, block, _ = query.shape
    scores = torch.bmm(query.flatten(1, 2).float(), key.float().transpose(1, 2)).mul_(scaling).unflatten(1, (group, block))
    scores[..., -block:] += mask
    return scores.softmax(dim=-1)
