"""Samples responses from the actor on a KV cache over the shared base.

Prompts are padded on the right and run once without any mask: causal attention keeps the padding out. The padding's
entries stay in the cache as holes; each decoding step masks them, and gives every row its own next position. So a row
gets the same numbers whatever its neighbours are. Rows that have ended leave the batch and its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from hydra_ppo.announce import allocating
from hydra_ppo.compat import attention_is_built_in, check_positions, decoding_mask
from hydra_ppo.config import RolloutSettings
from hydra_ppo.errors import UnsupportedModelError
from hydra_ppo.experience import pad_rows, split_by_length
from hydra_ppo.model import HydraModel


@dataclass(frozen=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        responses: token ids of each, the end-of-sequence token included where it came.
        logprobs: of each token under the temperature-scaled policy before top-k and top-p, nats.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]


@torch.no_grad()
def sample(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    eos_ids: Sequence[int],
    generator: torch.Generator,
    role: str = "actor",
    lengths: Sequence[int] | None = None,
    decoder: type[Decoder] | None = None,
) -> Samples:
    """Sample one response per prompt from a role with the lm head.

    Args:
        prompts: token ids, at least one each.
        settings: temperature, top_k, top_p, max_new_tokens, generation_batch_size.
        eos_ids: tokens that end a response.
        generator: source of randomness, on the model's device.
        role: `actor`, or `reference` for the policy that training started from.
        lengths: tokens of each response, at least 1, where they are given and end tokens do not end anything.
        decoder: what decodes a batch; `Decoder` where None.

    Memory: the KV cache of one generation batch, up to max_new_tokens more columns than its longest prompt, and a few
    (B, V) tensors.
    """
    was_training = model.training
    model.eval()
    responses: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    processors = LogitsProcessorList()
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        processors.append(TopPLogitsWarper(settings.top_p))
    try:
        with model.role(role), _decoding_attention(model):
            for rows in split_by_length([len(p) for p in prompts], settings.generation_batch_size or len(prompts)):
                batch = (decoder or Decoder)(model, [prompts[i] for i in rows])
                given = None if lengths is None else [lengths[i] for i in rows]
                tokens, token_logprobs, found = batch.run(settings, processors, eos_ids, generator, given)
                for row, ids, values, length in zip(rows, tokens.tolist(), token_logprobs.tolist(), found, strict=True):
                    responses[row] = ids[:length]
                    logprobs[row] = values[:length]
    finally:
        model.train(was_training)
    return Samples(responses, logprobs)


class KVCache(DynamicCache):
    """transformers' cache, which says what it allocates."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with allocating("kv cache"):
            return super().update(*args, **kwargs)


class Decoder:
    """One generation batch: its cache, and the rows that are still running."""

    def __init__(self, model: HydraModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.head = model.architecture.lm_head()
        check_positions(model.architecture.backbone)
        self.types, self.windows = model.architecture.layer_types, model.architecture.sliding_windows()
        self.dtype = model.causal_lm.get_input_embeddings().weight.dtype
        device = model.device
        ids, self.key_mask = pad_rows(prompts, 0, "right", device)  # (B, P)
        self.key_positions = torch.arange(ids.shape[1], device=device).expand_as(ids)  # (B, S)
        self.positions = self.key_mask.sum(dim=1)  # (B,) where the next token goes
        self.cache = KVCache()
        hidden = model.hidden_states(ids, past_key_values=self.cache)
        self.hidden = hidden[torch.arange(len(prompts), device=device), self.positions - 1]  # (B, H)
        self.rows = list(range(len(prompts)))

    def run(
        self,
        settings: RolloutSettings,
        processors: LogitsProcessorList,
        eos_ids: Sequence[int],
        generator: torch.Generator,
        given: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return tokens (B, max_new_tokens), their log-probs (the same shape) and lengths (B,), which may be given."""
        count, device = len(self.rows), self.hidden.device
        limit = settings.max_new_tokens if given is None else max(given)
        tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, limit, device=device)
        lengths = [limit] * count
        ends = torch.tensor(list(eos_ids), device=device)
        step = 0
        while True:
            logits = self.head.logits(self.hidden, settings.temperature)  # (B, V)
            log_p = logits.log_softmax(dim=-1)
            weights = processors(None, logits).softmax(dim=-1) if processors else log_p.exp()
            token = torch.multinomial(weights, 1, generator=generator)  # (B, 1)
            rows = torch.tensor(self.rows, device=device)
            tokens[rows, step] = token[:, 0]
            logprobs[rows, step] = log_p.gather(1, token)[:, 0]
            # The one wait for the device in a step: whether to go on, and with whom.
            ended = torch.isin(token[:, 0], ends).tolist() if given is None else [given[row] == step + 1 for row in self.rows]
            running = []
            for place, (row, done) in enumerate(zip(self.rows, ended, strict=True)):
                if done:
                    lengths[row] = step + 1
                else:
                    running.append(place)
            if not running or step + 1 == limit:
                return tokens, logprobs, lengths
            if len(running) < len(ended):
                index = torch.tensor(running, device=device)
                self._keep(index, running)
                token = token[index]
            step = self._advance(token, step, given)

    def _keep(self, index: Tensor, running: Sequence[int]) -> None:
        """Drop every row but those at places `running`, the same as `index`."""
        with allocating("kv cache"):
            self.cache.batch_select_indices(index)
        self.rows = [self.rows[place] for place in running]
        self.positions = self.positions[index]
        self.key_mask, self.key_positions = self.key_mask[index], self.key_positions[index]

    def _advance(self, token: Tensor, step: int, given: Sequence[int] | None) -> int:
        """Feed `token` (B, 1), the one of number `step`, keep the hidden state that comes out, return the next number."""
        position = self.positions[:, None]  # (B, 1)
        self.key_mask = torch.cat([self.key_mask, torch.ones_like(position, dtype=torch.bool)], dim=1)
        self.key_positions = torch.cat([self.key_positions, position], dim=1)
        seen = {}  # (B, S) by layer type
        for kind, window in self.windows.items():
            seen[kind] = self.key_mask
            if window is not None:
                seen[kind] = self.key_mask & (position - self.key_positions < window)
        with decoding_mask(self.model.architecture.layers, self.types, seen, self.dtype) as mask:
            hidden = self.model.hidden_states(token, past_key_values=self.cache, attention_mask=mask, position_ids=position)
        self.hidden = hidden[:, 0]
        self.positions = self.positions + 1
        return step + 1


@contextmanager
def _decoding_attention(model: HydraModel) -> Iterator[None]:
    """Decode with SDPA: flash-attention takes no mask for the holes, and has nothing to win on one query.

    Raises:
        UnsupportedModelError: when an old transformers built flash-attention into the layers.
    """
    config = model.architecture.config
    if attention_is_built_in(model.architecture.backbone):
        raise UnsupportedModelError(
            f"model={type(model.causal_lm).__name__} was built with flash-attention in its layers, as transformers below 4.48 "
            "does, and cannot sample; load it with attn_implementation='sdpa' or use a newer transformers."
        )
    before = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
