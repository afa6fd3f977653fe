"""Reference log-probs of the rows that the reward view has read: one pass gives both, scores now and log-probs later.

Hosts score rows first, some at a time, and ask for the reference's log-probs when all are there. The hidden states of all
rows would have to wait for that; their log-probs are a number per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_ppo.compute.logprobs import token_logprobs
from hydra_ppo.views.passes import Passes

Key = tuple[int, bytes]
"""What identifies a row: the position of its first token, and its tokens."""


class KnownRows:
    """Keeps log-probs by row, from `start()` to `stop()`, each until the host's step is over.

    Args:
        passes: those of the model's views.

    Attributes:
        kept: rows read by the reward view.
        used: rows for which the reference needed no pass.
    """

    def __init__(self, passes: Passes) -> None:
        self.kept = 0
        self.used = 0
        self.passes = passes
        self._rows: dict[Key, Tensor] = {}
        self._wanted = True

    def start(self) -> None:
        """Watch the passes."""
        self.passes.observers.append(self._remember)

    def stop(self) -> None:
        """Leave the passes as they were. A second call does nothing."""
        if self._remember in self.passes.observers:
            self.passes.observers.remove(self._remember)
        self._rows.clear()

    @torch.no_grad()
    def _remember(self, role: str, ids: Tensor, lengths: Tensor, positions: Tensor | None, hidden: Tensor) -> None:
        if role != "reward" or not self._wanted:
            return
        columns = torch.arange(ids.shape[1] - 1, device=ids.device) < lengths[:, None] - 1
        head = self.passes.model.architecture.lm_head()
        logprobs = token_logprobs(hidden[:, :-1][columns], ids[:, 1:][columns], head).logprobs
        counts = lengths.tolist()
        firsts = [0] * len(ids) if positions is None else positions[:, 0].tolist()
        rows = logprobs.split([max(count - 1, 0) for count in counts])
        for first, row, count, found in zip(firsts, ids, counts, rows, strict=True):
            self._rows[_key(first, row[:count])] = found
        self.kept += len(ids)
        self.passes.forget()  # what the hidden states were kept for is known

    def find(self, tokens: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Return log-probs (B, T - 1) of the next tokens, 0 at padding; None where a row was not read, at these positions.

        Args:
            tokens: (B, T).
            attention_mask: (B, T), padding on either side; positions count columns.
        """
        found = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, device=tokens.device)
        for ids, counts, row in zip(tokens, attention_mask.bool(), found, strict=True):
            columns = counts.nonzero()[:, 0].tolist()
            if not columns or columns[-1] - columns[0] + 1 != len(columns):
                return None  # padding between tokens
            known = self._rows.get(_key(columns[0], ids[columns[0] : columns[-1] + 1]))
            if known is None:
                return None
            row[columns[0] : columns[-1]] = known
        self.used += len(tokens)
        return found

    def end_step(self) -> None:
        """Forget the rows. If none was asked for, the user scores other tokens than those: keep none any more."""
        if self._rows and not self.used:
            self._wanted = False
        self._rows.clear()


def _key(first: int, tokens: Tensor) -> Key:
    return first, tokens.long().cpu().numpy().tobytes()
