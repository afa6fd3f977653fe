"""A base and a scalar head as a sequence classifier of transformers, which reads the last token of a row."""

from __future__ import annotations

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hydra_ppo.compat import backbone_of
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.model.architecture import inspect_architecture, text_config, understand_head

PROBE_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference between a classifier's scores of two short rows and ours, in fp32 and in bf16 or fp16, relative to the
norm of the products that make up a score: rounding stays far below, another place is of the order of 1."""

PROBE_ROWS = ((5, 6, 7, 8, 9), (5, 7))


@torch.no_grad()
def as_classifier(causal_lm: PreTrainedModel, head: Tensor, pad_id: int, end_id: int, label: str) -> PreTrainedModel:
    """Put the backbone of a causal LM and a scalar head into the sequence classifier of its family.

    Args:
        causal_lm: without adapters; its backbone is taken over, and its embeddings grow where `pad_id` is beyond them.
        head: (1, H).
        pad_id: fills up rows, and is part of no text.
        end_id: a token that ends answers, to try the classifier with.
        label: name of the one label.

    Returns:
        A model whose logits are (B, 1): what the head says at the last token of each row that is not `pad_id`.

    Raises:
        UnsupportedModelError: where the family has no classifier, or it is not the backbone and one linear layer.

    Memory: none beside the causal LM but the head, and the embeddings once more while they grow.
    """
    backbone = backbone_of(causal_lm)
    assert backbone is not None  # or it could not have been a shared base
    if understand_head(inspect_architecture(causal_lm)).through_model:
        raise _refusal(causal_lm, "its heads read what lies behind the backbone, where a classifier reads the backbone itself")
    _grow_embeddings(causal_lm, pad_id)
    config = deepcopy(causal_lm.config)
    config.num_labels, config.problem_type, config.pad_token_id = 1, "regression", pad_id
    config.id2label, config.label2id = {0: label}, {label: 0}
    try:
        with torch.device("meta"):
            classifier: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise _refusal(causal_lm, "transformers has no sequence classifier of its family") from None
    prefix = classifier.base_model_prefix
    if type(getattr(classifier, prefix, None)) is not type(backbone):
        raise _refusal(causal_lm, f"{type(classifier).__name__} has another backbone")
    setattr(classifier, prefix, backbone)
    left = {name.rpartition(".")[0] for name, tensor in classifier.named_parameters() if tensor.is_meta}
    score = classifier.get_submodule(next(iter(left))) if len(left) == 1 else None
    if not isinstance(score, nn.Linear) or score.bias is not None or score.weight.shape != head.shape:
        raise _refusal(causal_lm, f"{type(classifier).__name__} has more than one linear layer after its backbone")
    score.weight = nn.Parameter(head.to(backbone.dtype), requires_grad=False)
    classifier.eval()
    _try_out(classifier, backbone, score, pad_id, end_id)
    return classifier


def _grow_embeddings(causal_lm: PreTrainedModel, pad_id: int) -> None:
    """Give `pad_id` a row of zeros, which no token that counts ever sees, where the embeddings end before it."""
    embedding = cast(nn.Embedding, causal_lm.get_input_embeddings())
    missing = pad_id + 1 - embedding.weight.shape[0]
    if missing > 0:
        rows = embedding.weight.new_zeros(missing, embedding.weight.shape[1])
        embedding.weight = nn.Parameter(torch.cat([embedding.weight, rows]), requires_grad=False)
        embedding.num_embeddings = text_config(causal_lm).vocab_size = pad_id + 1


def _try_out(classifier: PreTrainedModel, backbone: nn.Module, score: nn.Linear, pad_id: int, end_id: int) -> None:
    """Compare the scores of two padded rows with those of the same rows alone, from backbone and head."""
    vocabulary, device = classifier.config.vocab_size, score.weight.device
    rows = [[i % vocabulary for i in row if i % vocabulary != pad_id] + [end_id] for row in PROBE_ROWS]
    width = max(map(len, rows))
    padded = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    found = classifier(input_ids=padded, attention_mask=mask).logits[:, 0].float()
    alone = [backbone(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0, -1] for row in rows]
    products = torch.stack(alone).float() * score.weight.float()  # (2, H)
    difference = ((found - products.sum(dim=1)).abs() / products.norm(dim=1).clamp(min=1e-12)).max().item()
    if not difference <= (PROBE_TOLERANCE if score.weight.dtype == torch.float32 else HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"model={type(classifier).__name__} scores two rows otherwise than its backbone and the head do (relative "
            f"difference {difference:.2g}), so its scores would be wrong; use hydra-ppo score."
        )


def _refusal(causal_lm: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model={type(causal_lm).__name__} cannot leave as a classifier: {why}; use hydra-ppo score, or a base of a family "
        "that has one, such as Llama, Mistral, Qwen2, Gemma 3 (text), Phi-3, GPT-2, GPT-NeoX or OPT."
    )
