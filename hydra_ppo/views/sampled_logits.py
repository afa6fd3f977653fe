"""What stands for the logits of a rollout in code that asks them for one number per token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hydra_ppo.errors import HydraError
from hydra_ppo.views.lazy import Lazy, left_of_vocabulary


@dataclass(eq=False)
class SampledLogits(Lazy):
    """Logits of a rollout, of which only the sampled tokens' log-probs were kept; they stand for normalised logits.

    Args:
        tokens: (B, R) sampled tokens.
        logprobs: (B, R) their log-probs under the distribution they were drawn from.
        vocabulary: V.
    """

    tokens: Tensor
    logprobs: Tensor
    vocabulary: int

    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.tokens.shape, self.vocabulary))

    @property
    def ndim(self) -> int:
        return self.tokens.ndim + 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> SampledLogits:
        parts, left = left_of_vocabulary(index, self.ndim)
        if not left:
            self.materialize("indexing the vocabulary")
        return SampledLogits(self.tokens[parts], self.logprobs[parts], self.vocabulary)

    def __iter__(self) -> Iterator[SampledLogits]:
        return (self[row] for row in range(len(self)))

    def log_softmax(self, dim: int = -1) -> SampledLogits:
        return self

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        return torch.zeros_like(self.logprobs[..., None] if keepdim else self.logprobs)

    def gather(self, dim: int, index: Tensor) -> Tensor:
        if index.shape != (*self.tokens.shape, 1) or not torch.equal(index[..., 0], self.tokens):
            self.materialize("log-probs of tokens that were not sampled")
        return self.logprobs[..., None]

    def materialize(self, why: str = "materialize") -> Tensor:
        raise HydraError(
            f"rollout logits asked for {why}: the patch keeps log-probs of the sampled tokens only; run the actor view on the "
            "sequences where more of its distribution is needed."
        )
