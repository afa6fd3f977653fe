"""Where the answers of one model end: tokenizer, chat template and generation config asked together, and made to agree."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch._guards import detect_fake_mode

from hydra_ppo.compute.quantized_rows import QuantizedRows
from hydra_ppo.data.ends import find_ends
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import template_digest
from hydra_ppo.model.role_model import RoleModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def end_tokens(model: RoleModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None = None) -> list[int]:
    """Return the tokens that end a response; the first is the one that training answers end in, and scores are read at.

    What a user should know is logged: an end of the generation config that is an ordinary word of the tokenizer, an end
    whose embedding was never trained.

    Raises:
        ConfigError: where nothing ends an answer.
    """
    configured = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ends = find_ends(tokenizer, generation_ids=ids, end_of_turn=end_of_turn)
    for note in ends.notes:
        logger.warning(note)
    if (twin := untrained_like(model, ends.turn)) is not None:
        logger.warning(
            f"answers end at {ends.text} ({ends.turn}), whose embedding equals that of token {twin}: it was never trained, so "
            "joint SFT has to teach it through the adapters alone; data.end_of_turn names another end."
        )
    return list(ends.ids)


def untrained_like(model: RoleModel, token: int) -> int | None:
    """Return another token with the very same embedding, as rows have that were added and never trained; None where none is."""
    weight = model.architecture.input_embeddings.weight
    # A simulated model's tensors have shapes and no numbers.
    if model.stage.tunes_base or not 0 <= token < weight.shape[0] or detect_fake_mode([weight.data]) is not None:
        return None
    held = weight.values if isinstance(weight, QuantizedRows) else weight
    few = held[:, :8]  # (V, 8), so that no second embedding is made
    alike = (few == few[token]).all(dim=1).nonzero()[:, 0].tolist()
    return next((i for i in alike if i != token and torch.equal(weight[i], weight[token])), None)


def settle_ends(model: RoleModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, reads_head: bool) -> None:
    """Let a model end its answers at `ids`, the first of them the trained one, and whoever generates with it too.

    Args:
        reads_head: whether scores come from the reward head, which says something at the token that it was trained at.

    Raises:
        ConfigError: where that head would be read at another token than it was trained at.
    """
    turn, trained = ids[0], model.trained_end
    if reads_head and trained is not None and trained != turn:
        names = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in (turn, trained)]
        raise ConfigError(
            f"data.end_of_turn: answers end at {names[0]} here, but the reward head was trained at {names[1]}; set it to "
            "that token, or use the tokenizer and chat template of the run that trained it."
        )
    template = template_digest(tokenizer)
    if model.template is not None and model.template != template:
        logger.warning(
            "%s, and this model was trained with another; put the tokenizer of its run back, or expect other answers and "
            "scores.",
            "the tokenizer has no chat template" if template is None else "the chat template has changed",
        )
    model.trained_end, model.template = turn, template
    model.causal_lm.generation_config.eos_token_id = list(ids)
