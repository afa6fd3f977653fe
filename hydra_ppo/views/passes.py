"""Passes over the base for outside code: padding on either side, and one pass for reference and reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compute.padding import pad_on_the_right
from hydra_ppo.model.hydra import HydraModel


class Passes:
    """Passes over the base, for all views of one model.

    A frozen pass is kept until the reward or the reference has used it too, since both read the same hidden states; a
    pass with a graph, or sampling, drops it.

    Memory: one (B, T, H) hidden state between the reference's pass and the reward's.

    Attributes:
        observers: each called after a frozen pass that reference and reward share, with the role that asked, ids (B, T) with
            padding last, lengths (B,), positions (B, T) or None where all rows count from 0, and hidden states (B, T, H).
        reused: frozen passes that served a second role.
    """

    def __init__(self, model: HydraModel) -> None:
        self.model = model
        self.observers: list[Callable[[str, Tensor, Tensor, Tensor | None, Tensor], None]] = []
        self.reused = 0
        self._frozen: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None  # ids, lengths, positions, hidden

    def hidden_states(
        self, role: str, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return (B, T, H) final hidden states in `role`; what stands at padding means nothing."""
        if torch.is_grad_enabled() and role in self.model.trainable_roles:
            self.forget()
        if attention_mask is None:
            lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
            return self._run(role, input_ids, lengths, position_ids)
        rows = pad_on_the_right(input_ids, attention_mask, position_ids)
        if rows is None:
            with self.model.role(role):
                return self.model.hidden_states(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        positions = rows.position_ids
        if position_ids is None and self.model.architecture.config.model_type == "opt":
            positions = None  # the one family that counts tokens, not columns
        return rows.restore(self._run(role, rows.input_ids, rows.lengths, positions))

    def _run(self, role: str, ids: Tensor, lengths: Tensor, positions: Tensor | None) -> Tensor:
        options: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        shared = self.model.roles["reference"].adapter == self.model.roles["reward"].adapter
        if role not in ("reference", "reward") or not shared:
            with self.model.role(role):
                return self.model.hidden_states(ids, **options)
        if self._frozen is not None and self._covers(ids, lengths, positions):
            hidden = self._frozen[-1][:, : ids.shape[1]]
            self.forget()
            self.reused += 1
            return hidden
        self.forget()
        with torch.no_grad(), self.model.role(role):
            hidden = self.model.hidden_states(ids, **options)
        self._frozen = (ids, lengths, positions, hidden)
        for observer in self.observers:
            observer(role, ids, lengths, positions, hidden)
        return hidden

    def _covers(self, ids: Tensor, lengths: Tensor, positions: Tensor | None) -> bool:
        """Return whether the kept pass saw the same tokens and perhaps more: later ones change nothing before them."""
        assert self._frozen is not None
        known, known_lengths, known_positions, _ = self._frozen
        width = ids.shape[1]
        if len(known) != len(ids) or known.shape[1] < width or (known_positions is None) != (positions is None):
            return False
        counts = torch.arange(width, device=ids.device) < lengths[:, None]
        same = known[:, :width] == ids
        if positions is not None and known_positions is not None:
            same = same & (known_positions[:, :width] == positions)
        return bool(((same | ~counts).all() & (lengths <= known_lengths).all()).item())

    def forget(self) -> None:
        """Let go of the frozen pass."""
        self._frozen = None
