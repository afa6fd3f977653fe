"""Logits of a step-style trainer whose response tokens were looked up once, and the functions that ask them for it.

The trainer asks three times: for the log-probs of next tokens, row by row for their normaliser, and in its loss for the
entropy. One pass over the vocabulary gives all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hydra_ppo.patches.versions import HostError
from hydra_ppo.views.lazy import Lazy
from hydra_ppo.views.lazy_logits import LazyLogits


@dataclass(eq=False)
class ScoredLogits(Lazy):
    """Logits whose next tokens were looked up already; anything else about them is left to `logits`.

    Args:
        logprobs: (B, T) log-probs of the next tokens, 0 where they are not asked for.
        entropy: (B, T) in nats, without a graph, 0 in the same places.
        logits: (B, T, V) themselves, None where no pass was needed.
    """

    logprobs: Tensor
    entropy: Tensor
    logits: LazyLogits | None

    def unscored(self) -> LazyLogits:
        """Return the lazy logits."""
        if self.logits is None:
            raise HostError(
                "reference logits are not at hand: their log-probs were kept from the reward view's pass; read them outside of "
                "batched_forward_pass, from role_views(model).reference."
            )
        return self.logits

    def materialize(self, why: str = "materialize") -> Tensor:
        return self.unscored().materialize(why)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.unscored(), name)

    def __len__(self) -> int:
        return len(self.logprobs)

    def __iter__(self) -> Iterator[LazyLogits]:
        return iter(self.unscored())

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) == 3 and isinstance(parts[2], slice) and parts[2] == slice(None):
            parts = parts[:2]
        if len(parts) > 2 or not all(isinstance(part, slice) for part in parts):
            return self.unscored()[index]
        logits = self.logits[parts] if self.logits is not None else None
        return ScoredLogits(self.logprobs[parts], self.entropy[parts], logits)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.cat and len(args) == 1 and not kwargs and all(isinstance(part, cls) for part in args[0]):
            return cls._cat(args[0])
        args, kwargs = tree_map(lambda part: part.unscored() if isinstance(part, cls) else part, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def _cat(cls, rows: list[ScoredLogits]) -> ScoredLogits:
        if len(rows) == 1:
            return rows[0]
        kept = all(part.logits is not None for part in rows)
        return cls(
            torch.cat([part.logprobs for part in rows]),
            torch.cat([part.entropy for part in rows]),
            torch.cat([part.logits for part in rows]) if kept else None,
        )


def score_next(logits: LazyLogits, tokens: Tensor, columns: Tensor) -> ScoredLogits:
    """Look up next tokens of logits (B, T, V) in the columns (B, T - 1) that count.

    Memory: as `token_logprobs` for that many positions.
    """
    with torch.autocast(logits.device.type, enabled=False):  # the head computes in the type it has
        found = logits[:, :-1][columns].token_logprobs(tokens[:, 1:][columns])
    zeros = found.logprobs.new_zeros(columns.shape)
    logprobs, entropy = (zeros.masked_scatter(columns, numbers) for numbers in (found.logprobs, found.entropy.detach()))
    return ScoredLogits(nn.functional.pad(logprobs, (0, 1)), nn.functional.pad(entropy, (0, 1)), logits)


def response_columns(attention_mask: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    """Return (B, T - 1), True where the next token belongs to the response.

    Args:
        attention_mask: (B, T), padding on either side.
        lengths: of query and response, by row.
    """
    query, response = torch.tensor(lengths, device=attention_mask.device).T[..., None]  # (B, 1)
    start = attention_mask.argmax(dim=1, keepdim=True) + query - 1
    columns = torch.arange(attention_mask.shape[1] - 1, device=attention_mask.device)
    return (columns >= start) & (columns < start + response) & attention_mask[:, 1:].bool()


# -- what is bound -------------------------------------------------------------------------------------------------------


def logprobs_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return TRL's function of that name, which knows scored logits too."""

    @wraps(original)
    def logprobs_from_logits(logits: Any, labels: Any, gather: bool = True) -> Any:
        if isinstance(logits, ScoredLogits) and gather:
            return logits.logprobs
        return original(logits, labels, gather=gather)

    return logprobs_from_logits


def entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return TRL's function of that name, which knows scored and lazy logits too."""

    @wraps(original)
    def entropy_from_logits(logits: Any) -> Any:
        # The trainer's own loss is who asks here: it reports the entropy, without its gradient.
        if isinstance(logits, ScoredLogits):
            return logits.entropy
        return logits.detach().entropy() if isinstance(logits, LazyLogits) else original(logits)

    return entropy_from_logits
