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
        ConfigError: where the model looks positions up in a table, learned or computed once, that ends before.
    """
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


def _stretched(config: Any, known: int) -> int:
    """Return the positions that a rotary embedding was stretched to (YaRN and its like)."""
    found = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    reach = [int(kind["factor"] * kind.get("original_max_position_embeddings", known)) for kind in kinds if kind.get("factor")]
    return max(reach, default=known)
