"""Embeddings and output head in 8 or 4 bits: the two largest weights that bitsandbytes' layers leave in the compute type.

One copy where they are tied, as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.compute.quantized_rows import GROUP, QuantizedRows, RowsKind
from hydra_ppo.errors import ConfigError, UnsupportedModelError


class QuantizedEmbedding(nn.Module):
    """What stands for an `nn.Embedding`: rows of tokens (...) in the compute type, (..., H).

    Args:
        rows: the weight.
        scale: what the model's own class multiplies them with (Gemma).
    """

    def __init__(self, rows: QuantizedRows, padding_idx: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        # transformers takes a model's type from its first parameter, which this holds the place of.
        self.compute_type = nn.Parameter(torch.empty(0, dtype=rows.dtype, device=rows.device), requires_grad=False)
        self.rows = rows
        self.num_embeddings, self.embedding_dim = rows.shape
        self.padding_idx, self.scale = padding_idx, scale

    @property
    def weight(self) -> QuantizedRows:
        """The rows, where a weight is asked for its shape, type and place."""
        return self.rows

    def forward(self, input_ids: Tensor) -> Tensor:
        found = self.rows[input_ids]
        return found if self.scale is None else found * torch.tensor(self.scale, dtype=found.dtype)


class QuantizedHead(nn.Linear):
    """What stands for the output head: an `nn.Linear` to those who ask, whose weight is held in fewer bits and frozen.

    Memory: of a pass a block of the vocabulary in the compute type, and the logits.
    """

    def __init__(self, rows: QuantizedRows, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own makes a weight
        self.rows = rows
        self.out_features, self.in_features = rows.shape
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> QuantizedRows:  # type: ignore[override]  # of which there is none in the compute type
        """The rows, where a weight is asked for its shape, type and place."""
        return self.rows

    def forward(self, hidden: Tensor) -> Tensor:
        return LMHead(self.rows, self.bias).raw(hidden).to(hidden.dtype)

    def drop(self) -> None:
        """Let go of the rows, for models that are never asked for logits."""
        self.rows = QuantizedRows(self.rows.kind, (0, self.in_features), self.rows.dtype, self.rows.device)


def quantize_embeddings(
    model: PreTrainedModel, kind: str, quantized: Callable[[Tensor, RowsKind], QuantizedRows] | None = None
) -> None:
    """Hold the input embedding and the output head of a causal LM in `kind`, in place.

    Args:
        model: frozen, weights in the compute type, wherever they lie.
        kind: int8 or nf4.
        quantized: makes the rows of a weight; None makes them of its numbers, where it lies.

    Raises:
        ConfigError: when there is no such kind.
        UnsupportedModelError: when the width is no multiple of `GROUP`, or the embedding does more than look up rows.

    Memory: one of the two weights beside its smaller self, a block of rows in fp32.
    """
    check_width(model, kind)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        return
    scale = _scale_of(embedding, kind)
    tied = head.weight is embedding.weight
    rows = (quantized or _quantized)(embedding.weight.data, cast(RowsKind, kind))
    _replace(model, embedding, QuantizedEmbedding(rows, embedding.padding_idx, scale))
    del embedding
    if not tied:
        rows = (quantized or _quantized)(head.weight.data, cast(RowsKind, kind))
    bias = None if head.bias is None else nn.Parameter(head.bias.data.to(rows.device), requires_grad=False)
    _replace(model, head, QuantizedHead(rows, bias))


def embeddings_kind(model: nn.Module) -> str | None:
    """Return how the embedding of a model is held: int8, nf4, or None for plain weights."""
    held = next((module for module in model.modules() if isinstance(module, QuantizedEmbedding)), None)
    return None if held is None else held.rows.kind


def check_width(model: PreTrainedModel, kind: str) -> None:
    """Refuse a kind that there is none of, and a model whose rows cannot be held in groups.

    Raises:
        ConfigError, UnsupportedModelError: naming the kind, or the width.
    """
    if kind not in get_args(RowsKind):
        raise ConfigError(f"model.quantize_embeddings={kind!r} is unknown; choose int8, nf4 or null.")
    if isinstance(model.get_input_embeddings(), QuantizedEmbedding):
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] % GROUP:
            width = "none" if not isinstance(weight, Tensor) else weight.shape[-1]
            raise UnsupportedModelError(
                f"model.quantize_embeddings={kind!r} needs embeddings and an output head whose width is a multiple of {GROUP}; "
                f"{type(model).__name__} has {width}: leave it at null."
            )


def _scale_of(embedding: Any, kind: str) -> float | None:
    """Return what an embedding multiplies its rows with; None for 1.

    Raises:
        UnsupportedModelError: where it does something else.
    """
    scale = None if type(embedding) is nn.Embedding else getattr(embedding, "embed_scale", None)
    factor = None if scale is None else float(scale)
    if type(embedding) is nn.Embedding and embedding.max_norm is None:
        return None
    weight = embedding.weight
    if factor is not None:
        if weight.device.type == "meta":  # its class was asked where it has numbers
            return factor
        tokens = torch.arange(min(4, len(weight)), device=weight.device)
        with torch.no_grad():
            expected = weight[tokens] * torch.tensor(factor, dtype=weight.dtype)
            if torch.equal(embedding(tokens), expected):
                return factor
    raise UnsupportedModelError(
        f"model.quantize_embeddings={kind!r}: {type(embedding).__name__} does more than look up rows; leave it at null."
    )


def rows_taker(kind: str, device: torch.device) -> Callable[[str, Tensor], QuantizedRows]:
    """Return what makes rows on a device of weights as they come from files, by name; a block of rows at a time."""
    return lambda name, weight: _quantized(weight, cast(RowsKind, kind), device)


def _quantized(weight: Tensor, kind: RowsKind, device: torch.device | None = None) -> QuantizedRows:
    rows = QuantizedRows.of(weight, kind, weight.dtype, device or weight.device)
    if not rows.isfinite().all():
        raise UnsupportedModelError(
            f"model.quantize_embeddings={kind!r}: a weight of {list(weight.shape)} holds numbers that are NaN or infinite; "
            "get the model again."
        )
    return rows


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is."""
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in places:
        model.set_submodule(name, new)
