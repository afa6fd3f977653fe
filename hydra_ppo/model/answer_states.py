"""Final states of answers: at the last token, where the reward head reads, and their mean."""

from __future__ import annotations

from torch import Tensor

from hydra_ppo.experience import Sequences
from hydra_ppo.model.head_reading import mean_states
from hydra_ppo.model.role_model import RoleModel


def ends_and_means(model: RoleModel, sequences: Sequences, means: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the current role's final states at the last response token, and where asked their means over the response.

    Returns:
        (B, H) fp32 each; of a row without a response, the state of the last prompt token, and zeros.

    Memory: one (B, T, H) hidden state; for means (B, R, H) in fp32 besides.
    """
    states = model._states(sequences)
    ends = states.at(sequences.last_positions()[:, None])[:, 0].float()
    return ends, mean_states(states, sequences) if means else None
