"""Decoders for models whose cache or masks are not as `decoder` takes them: slower, and as the model itself does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_ppo.compat import model_cache
from hydra_ppo.experience import pad_rows
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.rollout.prefill import say_whole


class _PlainDecoder(Decoder):
    """Keeps the rows that have ended where they are; what it returns of the others is the same."""

    takes_int8 = False
    takes_copies = False

    def _begin(self, model: HydraModel, prompts: Sequence[Sequence[int]], steps: int) -> None:
        model.check_width(max(map(len, prompts)) + steps)
        say_whole(model, "as this model's decoder does")
        self.model, self.prompts, self.steps = model, prompts, steps
        self.head = model.architecture.lm_head()
        self.rows = list(range(len(prompts)))
        self.index = torch.tensor(self.rows, device=model.device)

    def _drop(self, ended: Sequence[bool]) -> Tensor:
        left = [place for place, done in enumerate(ended) if not done]
        kept = torch.tensor(left, device=self.index.device)
        self.rows, self.index = [self.rows[place] for place in left], self.index[kept]
        return kept


class ModelCacheDecoder(_PlainDecoder):
    """Decodes rows of one prompt length at a time on the cache that transformers makes for the model, without any mask.

    Memory: such a cache for each length among the prompts, and no row leaves it before the last one has ended.
    """

    def __init__(self, model: HydraModel, prompts: Sequence[Sequence[int]], steps: int) -> None:
        self._begin(model, prompts, steps)
        device = model.device
        self.last = torch.zeros(len(prompts), dtype=torch.long, device=device)
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[row for row in self.rows if len(prompts[row]) == length] for length in lengths]
        self.groups = [(torch.tensor(rows, device=device), model_cache(model.architecture.config)) for rows in groups]
        for rows, cache in self.groups:
            ids = torch.tensor([prompts[row] for row in rows.tolist()], device=device)
            hidden = model.hidden_states(ids, past_key_values=cache)[:, -1]
            if rows is self.groups[0][0]:
                self.every = hidden.new_zeros(len(prompts), hidden.shape[-1])
            self.every[rows] = hidden
        self.hidden = self.every[self.index]

    def _advance(self, token: Tensor, step: int, given: Sequence[int] | None) -> int:
        self.last[self.index] = token[:, 0]
        for rows, cache in self.groups:
            if torch.isin(rows, self.index).any():
                self.every[rows] = self.model.hidden_states(self.last[rows, None], past_key_values=cache)[:, -1]
        self.hidden = self.every[self.index]
        return step + 1


class RecomputingDecoder(_PlainDecoder):
    """Runs prompt and answer anew for every token, for models that have no cache or one that cannot be trusted.

    Memory: a pass over the batch, without a cache.
    """

    def __init__(self, model: HydraModel, prompts: Sequence[Sequence[int]], steps: int) -> None:
        self._begin(model, prompts, steps)
        ids, mask = pad_rows(prompts, 0, "right", model.device)
        self.ids = torch.cat([ids, ids.new_zeros(len(ids), steps)], dim=1)  # (B, P + steps)
        self.ends = mask.sum(dim=1)  # (B,)
        self._run()

    def _run(self) -> None:
        ends = self.ends[self.index]
        hidden = self.model.hidden_states(self.ids[self.index, : int(ends.max())])
        self.hidden = hidden[torch.arange(len(ends), device=ends.device), ends - 1]

    def _advance(self, token: Tensor, step: int, given: Sequence[int] | None) -> int:
        self.ids[self.index, self.ends[self.index]] = token[:, 0]
        self.ends[self.index] += 1
        self._run()
        return step + 1
