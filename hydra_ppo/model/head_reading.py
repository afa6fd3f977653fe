"""What the scalar heads of a model say, in the role that is in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hydra_ppo.algorithms.advantages import bounded_values
from hydra_ppo.compute.packing import States
from hydra_ppo.errors import RoleError
from hydra_ppo.experience import Sequences
from hydra_ppo.model.heads import Heads, Readings, expected_rewards, mean_score, read_all
from hydra_ppo.model.refusing import Refusing
from hydra_ppo.model.roles import Role


def mean_states(states: States, sequences: Sequences) -> Tensor:
    """Return (B, H) fp32 the mean state over each response's tokens; zeros of a row without one. Memory: (B, R, H) fp32."""
    after = (sequences.state_positions() + 1).clamp(max=sequences.input_ids.shape[1] - 1)  # of each token, not before it
    mask = sequences.response_mask[..., None]
    return (states.at(after).float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class HeadReading(Refusing):
    """The half of a `RoleModel` that reads scalar heads.

    Attributes:
        heads: by name.
        roles: by name.
        value_range: bounds of what the value head says; None where it has none.
    """

    heads: Heads
    roles: Mapping[str, Role]
    value_range: tuple[float, float] | None
    _role: str | None

    @property
    def expects(self) -> bool:
        """Whether scores are what is above the reward that is to be expected of a prompt."""
        return "expected" in self.heads

    @property
    def reward_heads(self) -> int:
        """How many members the reward head has."""
        return self.heads["reward"].out_features

    def _states(self, sequences: Sequences) -> States:
        """Run the base in the current role."""
        raise NotImplementedError

    def values(self, sequences: Sequences) -> Tensor:
        """Return (B, R) values of the state before each response token, in the current role (critic or reward).

        Of the reward model they are r, also where scores are what is above the expected reward.
        """
        self._require_head("value", "reward")
        return self._scalar(self._states(sequences).at(sequences.state_positions()))

    def values_and_next(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return (B, R) values as `values` does, and (B,) those of the states after the last response tokens."""
        self._require_head("value", "reward")
        positions = torch.cat([sequences.state_positions(), sequences.last_positions()[:, None]], dim=1)
        found = self._scalar(self._states(sequences).at(positions))
        return found[:, :-1], found[:, -1]

    def bound_values(self, bounds: Sequence[float] | None) -> None:
        """Keep what the value head says within two bounds from now on, see `bounded_values`; None lets it be as it is."""
        self.value_range = None if bounds is None else (bounds[0], bounds[1])

    def scores(self, sequences: Sequences) -> Tensor:
        """Return (B,) what the current role's scalar head says at the last response token; of several members the mean.

        Where there is a head for the expected reward, scores of the reward model are r(x, y) - e(x).
        """
        self._require_head("value", "reward")
        return self._scores(self._states(sequences), sequences)

    def members(self, sequences: Sequences) -> Tensor:
        """Return (B, k) what each member of the reward head says, in a role that has it; `scores` is their mean."""
        self._require_head("reward")
        return self._members(self._states(sequences), sequences)

    def readings(self, sequences: Sequences, columns: Tensor | None = None, heads_only: bool = False) -> Readings:
        """Return what training reads of the reward heads, in a role that has them.

        Args:
            sequences: B rows.
            columns: as of `heads.read_all`.
            heads_only: let gradients end at the heads; the pass keeps nothing then.
        """
        self._require_head("reward")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not heads_only):
            states = self._states(sequences)
        return read_all(self.heads, states, sequences, columns)

    def scores_and_means(self, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return (B,) what `scores` does, and (B, H) fp32 the mean state over each response's tokens, its last one included."""
        self._require_head("value", "reward")
        states = self._states(sequences)
        return self._scores(states, sequences), mean_states(states, sequences)

    def _scalar(self, hidden: Tensor) -> Tensor:
        assert self._role is not None
        head = self.roles[self._role].head
        found = mean_score(self.heads[head], hidden)
        return found if head != "value" or self.value_range is None else bounded_values(found, *self.value_range)

    def _scores(self, states: States, sequences: Sequences) -> Tensor:
        found = self._scalar(states.at(sequences.last_positions()[:, None]))[:, 0]
        assert self._role is not None
        if self.expects and self.roles[self._role].head == "reward":
            return found - expected_rewards(self.heads, states, sequences)
        return found

    def _members(self, states: States, sequences: Sequences) -> Tensor:
        found = read_all(self.heads, states, sequences)
        return found.members if found.expected is None else found.members - found.expected[:, None]

    def _require_head(self, *heads: str) -> None:
        head = self.roles[self._role].head if self._role is not None else None
        if head not in heads:
            raise RoleError(
                f"role={self._role!r} has no {' or '.join(heads)} head; call this inside `with model.role(...)` of one "
                "that has."
            )
