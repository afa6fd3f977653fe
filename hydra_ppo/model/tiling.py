"""Which parts of a base run over pieces of a row, and what is said of those that cannot."""

from __future__ import annotations

import logging

from hydra_ppo.compute.tiled_mlp import run_whole, use_tiled_mlps
from hydra_ppo.compute.tiled_norm import use_tiled_norms
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.architecture import Architecture

logger = logging.getLogger("hydra_ppo")


def tile(architecture: Architecture, tokens: int, trained: bool) -> None:
    """Run gated MLPs and norms over pieces of `tokens` tokens, in place, and say in one line what else is run whole.

    Args:
        architecture: its MLPs are lean.
        tokens: at least 1.
        trained: whether the base itself is trained, whose weights then need the whole rows.

    Raises:
        ConfigError: for fewer tokens than one.
    """
    if tokens < 1:
        raise ConfigError(f"model.tile_tokens={tokens} must be greater than 0; set tile_tokens to a positive number.")
    name = type(architecture.causal_lm).__name__
    if trained:
        logger.warning("model.tile_tokens=%d: %s is trained itself, so that its layers are run whole", tokens, name)
        return
    use_tiled_mlps(architecture.layers, tokens)
    use_tiled_norms(architecture.backbone, tokens * architecture.config.hidden_size)
    found = [run_whole(layer) for layer in architecture.layers]
    if any(found):
        parts = " and ".join(dict.fromkeys(part for of_layer in found for part in of_layer))
        logger.warning(
            "model.tile_tokens=%d: %s in %d of %d layers of %s run on whole rows, being no gated MLP of plain or 4-bit layers",
            *(tokens, parts, sum(map(bool, found)), len(found), name),
        )
