"""One more token of every row through a Llama-shaped base, in as few operations as there can be.

A decoding step multiplies a handful of rows, so that what is around the products weighs as much as they do: Python between
modules, copies of keys, small kernels for each adapter. Here the first halves of the adapters of layers that read the same
input are one product, keys and values are written where the cache keeps them, and nothing is called that need not be.

Measured on a 2-core CPU, 16 rows, 8 layers of hidden size 512, fp32, in turns with the same steps through the model's own
modules: a rollout of 64 tokens took 1.10 s against 1.33, with prompts of different lengths 1.34 against 1.59 (medians of 11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hydra_ppo.compute.bases import Base
from hydra_ppo.compute.gated_mlp import Activation, activation_of
from hydra_ppo.compute.kv_cache import GrowingLayer, KVCache
from hydra_ppo.compute.kv_int8 import Int8Layer
from hydra_ppo.compute.lora import active_adapter, base_under
from hydra_ppo.compute.recompute import RecomputedForward
from hydra_ppo.compute.tiled_norm import runs_its_own
from hydra_ppo.compute.trunk import SkippableForward
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.weight_copies import WeightCopies
from hydra_ppo.runtime.announce import allocating

FAMILIES = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
"""transformers' backbones whose layers are norm, attention with rotated queries and keys, norm, gated MLP, and nothing else."""

SHORT = 256
"""Keys below which one query's attention in fp32 on a CPU is two plain products, where torch's kernel spends more time on
itself: for 16 rows of 95 keys 86 us against 121, for 300 keys 69 against 74, for 500 keys 123 against 102."""


Project = Callable[[Sequence[nn.Module]], Callable[[Tensor], Sequence[Tensor]]]
"""From linear layers that read the same input to what makes of that (B, I) the output of each, (B, O)."""


class LeanBackbone:
    """Feeds tokens to a backbone whose keys and values of earlier tokens are in `cache`, in the role of its making.

    Args:
        model: `supports(model)`, in a role.
        cache: already filled from the prompts.
        copies: weights to multiply with in place of the base's and the adapters'.

    Raises:
        LookupError: when the adapters in force are none that can be run here.

    Memory: a copy of the adapters' first halves (r x I) of the q, k, v, gate and up projections, in the compute type; none with
    `copies`.
    """

    def __init__(self, model: HydraModel, cache: KVCache, copies: WeightCopies | None = None) -> None:
        self.cache = cache
        backbone = model.architecture.backbone
        self.types = model.architecture.layer_types
        self.embed, self.rotary = model.architecture.input_embeddings, backbone.get_submodule("rotary_emb")
        dtype = self.embed.weight.dtype
        projections = partial(_Projections, dtype) if copies is None else copies.projections
        with allocating("adapters"):
            self.layers = [
                _Layer(layer, held, dtype, projections)
                for layer, held in zip(model.architecture.layers, cache.growing, strict=True)
            ]
        self.norm = _norm(backbone.get_submodule("norm"), dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor] | None) -> Tensor:
        """Return (B, H) final hidden states, after the last norm.

        Args:
            tokens: (B, 1).
            positions: (B,) of these tokens.
            masks: by layer type, (B, S), whether they see each column of the cache, their own included; None sees all.
        """
        embedded = self.embed(tokens)  # (B, 1, H)
        cos, sin = self.rotary(embedded, positions[:, None])  # (B, 1, D), both halves alike
        half = cos.shape[-1] // 2
        turn = cos[..., :half], sin[..., :half]
        self.cache.extend(1)
        hidden = embedded[:, 0]
        for layer, kind in zip(self.layers, self.types, strict=True):
            layer(hidden, turn, None if masks is None else masks[kind][:, None, None])
        return self.norm(hidden)


def supports(model: HydraModel) -> bool:
    """Return whether the base is one of the families, with nothing hooked into it, and every layer of it can be run here."""
    backbone = model.architecture.backbone
    kind = type(backbone)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return False
    if torch.is_autocast_enabled(model.device.type) or model.autocast_dtype is not None:
        return False
    if model.trunk is not None and not model.trunk.idle:
        return False
    own_hook = None if model.trunk is None else model.architecture.layers[model.trunk.count]
    for module in backbone.modules():
        if module._forward_hooks or len(module._forward_pre_hooks) > (module is own_hook):
            return False
    dtype = model.architecture.input_embeddings.weight.dtype
    return _is_own(backbone.get_submodule("rotary_emb")) and all(_is_plain(layer, dtype) for layer in model.architecture.layers)


def _is_plain(layer: Any, dtype: torch.dtype) -> bool:
    forward = vars(layer).get("forward", layer.forward)
    while isinstance(forward, RecomputedForward | SkippableForward):
        forward = forward.inner
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    bases = [base_under(part) for part in (*_linears(attention, "qkvo"), *_linears(mlp, ("gate", "up", "down")))]
    return (
        getattr(forward, "__func__", None) is type(layer).forward
        and _is_own(attention)
        and all(_is_own(norm) and norm.weight.dtype == dtype for norm in norms)
        and activation_of(mlp) is not None
        and all(base is not None and base.takes_type(dtype) for base in bases)
    )


def _is_own(module: nn.Module) -> bool:
    """Return whether a module runs its class's forward pass and no other library's."""
    return runs_its_own(module)


def _linears(parent: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [getattr(parent, f"{name}_proj") for name in names]


class _Layer:
    """One decoder layer. Its columns of the cache are there; it writes them."""

    def __init__(self, layer: Any, cache: GrowingLayer, dtype: torch.dtype, projections: Project) -> None:
        attention = layer.self_attn
        self.cache = cache
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.norm = _norm(layer.input_layernorm, dtype)
        self.entering = projections(_linears(attention, "qkv"))
        self.query_norm, self.key_norm = (
            _norm(getattr(attention, name), dtype) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")
        )
        self.leaving = projections(_linears(attention, "o"))
        self.mlp_norm = _norm(layer.post_attention_layernorm, dtype)
        self.widening = projections(_linears(layer.mlp, ("gate", "up")))
        activation = activation_of(layer.mlp)
        assert activation is not None
        self.activation: Activation = activation
        self.narrowing = projections(_linears(layer.mlp, ("down",)))

    def __call__(self, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        """Add to hidden (B, H), in place, what the layer adds; see `_turned` for `turn`; mask: (B, 1, 1, S)."""
        rows = len(hidden)
        query, key, value = (part.view(rows, -1, self.width) for part in self.entering(self.norm(hidden)))  # (B, heads, D)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = _turned(query, turn, torch.empty_like(query, memory_format=torch.contiguous_format))
        found = self._attention(query, key, value, turn, mask)
        (added,) = self.leaving(found.reshape(rows, -1))
        hidden.add_(added)
        gate, up = self.widening(self.mlp_norm(hidden))
        (added,) = self.narrowing(self.activation.forward(gate).mul_(up))
        hidden.add_(added)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Put key, not turned yet, and value into the last column of the cache; return what the turned query finds there."""
        if isinstance(self.cache, Int8Layer):
            self.cache.write(_turned(key, turn, torch.empty_like(key, memory_format=torch.contiguous_format)), value)
            return attend_int8(query, self.cache, mask, self.scaling)
        keys, values = self.cache.keys, self.cache.values  # (B, heads, S, D)
        _turned(key, turn, keys[:, :, -1])
        values[:, :, -1].copy_(value)
        return _attend(query, keys, values, mask, self.scaling)


class _Projections:
    """Linear layers that read the same input."""

    def __init__(self, dtype: torch.dtype, layers: Sequence[nn.Module]) -> None:
        adapters = [active_adapter(layer) for layer in layers]
        downs = [adapter.a for adapter in adapters if adapter is not None]
        # (sum of r, I). One alone is the adapter's own, and cast where it is used: all of them together are many.
        self.down = None if not downs else downs[0] if len(downs) == 1 else torch.cat([down.to(dtype) for down in downs])
        self.parts: list[tuple[Base, slice, Tensor | None, float]] = []
        begin = 0
        for layer, adapter in zip(layers, adapters, strict=True):
            base = base_under(layer)
            assert base is not None
            if adapter is None:
                self.parts.append((base, slice(0), None, 0.0))
            else:
                own = slice(begin, begin + len(adapter.a))
                self.parts.append((base, own, adapter.b, adapter.scaling))
                begin = own.stop

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return what each layer makes of x (B, I): (B, O), in whatever order of memory its kernel leaves it."""
        low = None if self.down is None else functional.linear(x, self.down.to(x.dtype))
        found = []
        for base, own, up, scaling in self.parts:
            y = base.product_of_few(x)
            if up is not None and low is not None:
                y.addmm_(low[:, own], up.to(x.dtype).T, alpha=scaling)
            found.append(y)
        return found


def _norm(norm: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what computes an RMS norm; in fp32 one operation, else the module itself, whose rounding is its own."""
    if dtype is not torch.float32:
        return norm
    weight = norm.weight
    return partial(_rms_norm, weight, tuple(weight.shape), norm.variance_epsilon)


def _rms_norm(weight: Tensor, shape: tuple[int, ...], epsilon: float, x: Tensor) -> Tensor:
    return functional.rms_norm(x, shape, weight, epsilon)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """Write x (B, heads, D) to `out`, rotated by the angles of its positions.

    Args:
        turn: cosines and sines, each (B, 1, D / 2); entry i turns entries i and i + D / 2 of x.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 34, with the halves that transformers pairs.
    """
    cos, sin = turn
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return (B, heads, 1, D) or (B, key-value heads, group, D), in the same order, for one query (B, heads, D) a row."""
    heads = keys.shape[1]
    if query.device.type == "cpu" and query.dtype is torch.float32 and keys.shape[2] < SHORT:
        return attend_by_products(query.unflatten(1, (heads, -1)), keys, values, mask, scaling)
    if mask is None or query.device.type == "cpu":
        grouped = query.shape[1] != heads
        return functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
    # With a mask, CUDA's kernels take no groups; the queries of a group stand where those of one head's tokens would.
    return functional.scaled_dot_product_attention(query.unflatten(1, (heads, -1)), keys, values, attn_mask=mask, scale=scaling)


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return softmax(scaling * q k^T) v, (B, heads, group, D), for queries (B, heads, group, D) that all see the same keys.

    Memory: the weights, (B, heads, group, S), twice.
    """
    weights = torch.matmul(query, keys.transpose(2, 3)).mul_(scaling)
    if mask is not None:
        weights.masked_fill_(~mask, -torch.inf)
    return torch.matmul(weights.softmax(dim=-1), values)


def attend_int8(query: Tensor, layer: Int8Layer, mask: Tensor | None, scaling: float) -> Tensor:
    """Return what `_attend` does, for one query (B, heads, D) a row and keys and values in int8.

    In fp32 they are cast, not dequantised: the scale of a key stands before its score, that of a value before its weight, of
    which there are fewer by D. In half precision scores would be rounded before their softmax, which attention's own kernel
    does in fp32; so it gets the dequantised layer.

    Measured on one core of an AMD EPYC, 16 rows of 8 heads of 128 for 32 queries, 95, 300 and 700 keys, processor time with
    freed memory kept as in a run: 3.2, 9.8 and 39 ms by products, 3.5, 13 and 50 dequantised, 2.4, 8.9 and 21 in fp32.

    Memory: keys, then values of the layer in fp32; both at once, dequantised, in half precision.
    """
    keys, values = layer.held
    assert keys.mixer is not None
    query, scaling = keys.mixer.mix(query).to(query.dtype), scaling / keys.mixer.gain
    if query.dtype is not torch.float32:
        return _attend(query, keys.whole(mixed=True), values.whole(), mask, scaling)
    (key_codes, key_scales), (value_codes, value_scales) = keys.filled, values.filled
    query = query.unflatten(1, (key_codes.shape[1], -1)) * scaling  # (B, key-value heads, group, D)
    weights = torch.matmul(query, key_codes.float().transpose(2, 3)).mul_(key_scales.transpose(2, 3))
    if mask is not None:
        weights.masked_fill_(~mask, -torch.inf)
    return torch.matmul(weights.softmax(dim=-1).mul_(value_scales.transpose(2, 3)), value_codes.float())
