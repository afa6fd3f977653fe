"""The pass over the prompts of a generation batch, on its empty cache: at once, or in pieces.

A piece attends to the columns that are in the cache and, causally, to its own. transformers makes that mask from the cache's
length, sliding windows included, so that nothing is larger than a piece times the columns; with grouped queries its attention
repeats one layer's keys and values for all heads, as it does wherever there is a mask.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compat import MASKS_BY_LAYER_TYPE
from hydra_ppo.compute.kv_cache import KVCache
from hydra_ppo.model.hydra import HydraModel

logger = logging.getLogger("hydra_ppo")


def prefill(model: HydraModel, ids: Tensor, ends: Tensor, cache: Any) -> Tensor:
    """Fill the cache with prompts, and return (U, H), the final hidden state at the last token of each.

    Args:
        model: in a role; its `tile_tokens` says how many tokens a piece has, rows times columns.
        ids: (U, P), padded on the right: causal attention keeps the padding out.
        ends: (U,) tokens of each row.
        cache: empty.

    Memory: the cache, and the activations of a pass over one piece; without `tile_tokens` over (U, P).
    """
    rows = torch.arange(len(ids), device=ids.device)
    width = ids.shape[1]
    if model.tile_tokens is None or ids.numel() <= model.tile_tokens or not _in_pieces(model, cache):
        return model.hidden_states(ids, past_key_values=cache)[rows, ends - 1]
    count = max(1, model.tile_tokens // len(ids))
    states: Tensor | None = None
    for start in range(0, width, count):
        piece = ids[:, start : start + count]
        positions = torch.arange(start, start + piece.shape[1], device=ids.device).expand_as(piece)
        hidden = model.hidden_states(piece, past_key_values=cache, position_ids=positions)
        last = ends - 1 - start  # the column in this piece, where it is in it
        found = hidden[rows, last.clamp(0, piece.shape[1] - 1)]
        states = (
            found if states is None else torch.where((last >= 0)[:, None] & (last < piece.shape[1])[:, None], found, states)
        )
        del hidden
    assert states is not None
    return states


def _in_pieces(model: HydraModel, cache: Any) -> bool:
    if MASKS_BY_LAYER_TYPE and isinstance(cache, KVCache):
        return True
    say_whole(model, "which transformers below 4.54 makes no masks for on a filled cache")
    return False


def say_whole(model: HydraModel, why: str) -> None:
    """Say, once for each model, that prompts are run in one go in spite of `model.tile_tokens`."""
    if model.tile_tokens is not None and not model.kept.get("prefill whole"):
        model.kept["prefill whole"] = True
        logger.warning("model.tile_tokens=%d: prompts are run in one go, %s", model.tile_tokens, why)
