"""How long a row may be: the positions that a model has a table for, or was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.compat import backbone_of
from hydra_ppo.errors import ConfigError

SPARE_ROWS = 8
"""Rows that a table of positions may have beyond those that count: OPT's has 2, for padding."""


def check_length(causal_lm: PreTrainedModel, longest: int, settings: str) -> str | None:
    """Refuse rows that are longer than a table of positions; return a line on those that go beyond what was trained.

    Args:
        causal_lm: in memory, or a `skeleton`.
        longest: tokens of the longest row there may be, T = P + R.
        settings: that say so, with their values.

    Raises:
        ConfigError: where the model looks positions up in a table, learned or computed once, that ends before; or where its
            rotary embedding follows the longest row beyond that, so that a row depends on its neighbours.
    """
    _check_rope(causal_lm, longest, settings)
    known = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return None  # ALiBi, or a recurrent state: no position is looked up
    if _has_table(causal_lm, known):
        if longest > known:
            raise ConfigError(
                f"{settings} make rows of up to {longest} tokens, the model's table has {known} positions; "
                f"lower them by {longest - known} in all."
            )
        return None
    known = max(known, _stretched(causal_lm.config.get_text_config(), known))
    if longest <= known:
        return None
    return (
        f"{settings} make rows of up to {longest} tokens, the model was trained for {known} positions: what it writes beyond "
        "them may make no sense."
    )


def _has_table(causal_lm: PreTrainedModel, known: int) -> bool:
    """Say whether positions are looked up in a table of `known` rows: GPT-2's and OPT's embeddings, GPT-J's buffer of sines."""
    backbone, tokens = backbone_of(causal_lm) or causal_lm, causal_lm.get_input_embeddings()
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and module is not tokens and 0 <= module.num_embeddings - known <= SPARE_ROWS:
            return True
        # Code that comes with a model may make its buffers longer when it needs them; transformers' own does not.
        if type(module).__module__.startswith("transformers."):
            held = [*module.buffers(recurse=False), *(value for value in vars(module).values() if isinstance(value, Tensor))]
            if any(table.ndim > 1 and table.shape[0] == known for table in held):
                return True
    return False


FOLLOWS = {"dynamic", "longrope"}
"""Rotary embeddings whose angles are those of the longest row of a batch, once it is longer than what was trained first."""


def _check_rope(causal_lm: PreTrainedModel, longest: int, settings: str) -> None:
    found = rope_limit(causal_lm)
    if found is not None and longest > found[0]:
        first, kind = found
        raise ConfigError(
            f"{settings} make rows of up to {longest} tokens; beyond {first} the model's rotary embedding ({kind}) is that "
            f"of the longest row, so that a row's numbers depend on its neighbours; lower them by {longest - first} in all."
        )


def rope_limit(causal_lm: PreTrainedModel) -> tuple[int, str] | None:
    """Return the length beyond which a rotary embedding is that of the longest row, and its kind; None where it never is."""
    config = causal_lm.config.get_text_config()
    found = []
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        first = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        first = first or getattr(config, "max_position_embeddings", None)
        if kind in FOLLOWS and first:
            found.append((int(first), str(kind)))
    return min(found, default=None)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    found = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    return [found, *(value for value in found.values() if isinstance(value, Mapping))]


def _stretched(config: Any, known: int) -> int:
    """Return the positions that a rotary embedding was stretched to (YaRN and its like)."""
    ropes = _ropes(config)
    reach = [int(rope["factor"] * rope.get("original_max_position_embeddings", known)) for rope in ropes if rope.get("factor")]
    return max(reach, default=known)
