"""Final states of answers: at the last token, where the reward head reads, and their mean."""

from __future__ import annotations

from torch import Tensor

from hydra_ppo.compute.packing import States
from hydra_ppo.experience import Sequences
from hydra_ppo.model.role_model import RoleModel


def ends_and_means(model: RoleModel, sequences: Sequences, means: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the current role's final states at the last response token, and where asked their means over the response.

    Returns:
        (B, H) fp32 each; of a row without a response, the state of the last prompt token, and zeros.

    Memory: one (B, T, H) hidden state; for means (B, R, H) in fp32 besides.
    """
    states = model._states(sequences)
    ends = states.at(sequences.last_positions()[:, None])[:, 0].float()
    return ends, _means(states, sequences) if means else None


def _means(states: States, sequences: Sequences) -> Tensor:
    after = (sequences.state_positions() + 1).clamp(max=sequences.input_ids.shape[1] - 1)  # of each token, not before it
    mask = sequences.response_mask[..., None]
    return (states.at(after).float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
