"""One generation batch on a KV cache over the shared base.

Prompts are padded on the right and run once without any mask: causal attention keeps the padding out. A prompt that comes
several times is run once, and its rows of the cache are repeated. The padding's entries stay in the cache as holes; each
decoding step masks them, and gives every row its own next position. So a row gets the same numbers whatever its neighbours
are. Where all prompts have one length there are no holes and no mask. Rows that have ended leave the batch and its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from hydra_ppo.compat import MASKS_BY_LAYER_TYPE, attention_is_built_in, check_positions, decoding_mask
from hydra_ppo.compute.drawing import draw
from hydra_ppo.compute.flash import is_flash
from hydra_ppo.compute.kv_cache import ConcatenatingCache, KVCache
from hydra_ppo.compute.kv_int8 import cache_for
from hydra_ppo.compute.packing import attention_of
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import NonFiniteError, UnsupportedModelError
from hydra_ppo.experience import pad_rows
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.lean_decoding import LeanBackbone, supports
from hydra_ppo.rollout.prefill import prefill
from hydra_ppo.rollout.weight_copies import WeightCopies
from hydra_ppo.runtime.interruption import check_stop


class Decoder:
    """One generation batch: its cache, and the rows that are still running.

    Args:
        prompts: token ids of each row.
        steps: most tokens of a response.
        kv_cache: auto or int8, as the setting says.
        copies: weights to decode with; of a model that `lean_decoding` supports.

    Attributes:
        never, stopped: as of `sampling.sample`.
        anybody: where processes decode in step, tells whether any of them has rows that go on; none leaves before all have
            ended, and no row leaves its batch.
        takes_int8: whether this kind of decoder knows the cache in int8.
        takes_copies: whether it can decode with copies of the weights.
    """

    takes_int8 = True
    takes_copies = True

    never: Sequence[int] = ()
    stopped: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None
    anybody: Callable[[bool], bool] | None = None

    def __init__(
        self,
        model: HydraModel,
        prompts: Sequence[Sequence[int]],
        steps: int,
        kv_cache: Literal["auto", "int8"] = "auto",
        copies: WeightCopies | None = None,
    ) -> None:
        self.model = model
        self.prompts, self.steps = prompts, steps
        self.head = model.architecture.lm_head()
        check_positions(model.architecture.backbone)
        self.types = model.architecture.layer_types
        self.dtype = model.architecture.input_embeddings.weight.dtype
        device = model.device
        different, sources = _distinct(prompts)
        ids, mask = pad_rows(different, 0, "right", device)  # (U, P)
        model.check_width(ids.shape[1] + steps)
        self.cache = cache_for(kv_cache, ids.shape[1] + steps - 1)  # the last token is not fed
        ends = mask.sum(dim=1)
        self.hidden = prefill(model, ids, ends, self.cache)  # (U, H)
        self.rows = list(range(len(prompts)))
        self.index = torch.tensor(self.rows, device=device)
        self.positions = ends  # (U,) where the next token goes
        if len(different) < len(prompts):
            self.cache.keep(sources, device)
            again = torch.tensor(sources, device=device)
            self.hidden, self.positions, mask = self.hidden[again], self.positions[again], mask[again]
        self._prepare_masks([len(prompt) for prompt in prompts], mask)
        self.lean = _lean_backbone(model, self.cache, copies)
        if copies is not None and self.lean is not None:
            self.head = copies.head(self.head)

    def _prepare_masks(self, lengths: Sequence[int], mask: Tensor) -> None:
        """Decide by layer type what a query may see, for prompts of these lengths with this mask (B, P)."""
        longest = max(lengths) + self.steps - 1
        self.windows = {
            kind: None if window is None or longest <= window else window
            for kind, window in self.model.architecture.sliding_windows().items()
        }
        # Older versions make a mask where there is none, some of them a wrong one.
        self.masked = (
            min(lengths) < max(lengths)
            or any(window is not None for window in self.windows.values())
            or not MASKS_BY_LAYER_TYPE
        )
        if self.masked:
            # For all columns that there will be: (B, P + steps - 1), whether they hold a token and its position.
            more = torch.arange(self.steps - 1, device=mask.device)
            self.key_mask = torch.cat([mask, mask.new_ones(len(mask), len(more))], dim=1)
            before = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            self.key_positions = torch.cat([before, self.positions[:, None] + more], dim=1)

    def run(
        self, settings: RolloutSettings, eos_ids: Sequence[int], uniform: Tensor, given: Sequence[int] | None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return tokens (B, steps), their log-probs (the same shape) and lengths (B,), which may be given.

        Args:
            settings, eos_ids: as of `sampling.sample`.
            uniform: (steps, B) in [0, 1), fp64: what draws each token. A row has numbers of its own, so that what it draws does
                not depend on who has left.
            given: lengths.

        Raises:
            NonFiniteError: when logits were NaN or infinite.
        """
        count, steps, device = len(self.rows), self.steps, self.hidden.device
        tokens = torch.zeros(steps, count, dtype=torch.long, device=device)
        logprobs = torch.zeros(steps, count, device=device)
        lengths = [steps] * count
        ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        keep = _processors(settings)
        history = _History(self.prompts, steps, device) if settings.repetition_penalty != 1.0 else None
        never = torch.tensor(list(self.never), device=device) if self.never else None
        not_yet = torch.tensor([*self.never, *eos_ids], device=device) if settings.min_new_tokens else None
        step = 0
        while True:
            check_stop()
            logits = self.head.logits(self.hidden, settings.temperature)
            bent = keep if history is None else partial(_penalised, history.ids(self.index), settings.repetition_penalty, keep)
            left_out = not_yet if step < settings.min_new_tokens else never
            drawn = draw(logits, uniform[step, self.index], bent, left_out)
            tokens[step, self.index] = drawn.tokens
            if history is not None:
                history.add(step, self.index, drawn.tokens)
            logprobs[step, self.index] = drawn.logprobs
            if step + 1 == steps:
                break
            # The one wait for the device in a step: whether to go on, and with whom.
            ended = torch.isin(drawn.tokens, ends).tolist() if given is None else self._given_ends(given, step + 1)
            if self.stopped is not None and given is None and step + 1 >= settings.min_new_tokens:
                so_far = tokens[: step + 1, self.index].T.tolist()
                ended = [a or b for a, b in zip(ended, self.stopped(so_far), strict=True)]
            token = drawn.tokens
            for row, done in zip(self.rows, ended, strict=True):
                if done:
                    lengths[row] = min(lengths[row], step + 1)
            if self.anybody is not None:
                if not self.anybody(steps in lengths):
                    break
            elif False not in ended:
                break
            elif True in ended:
                token = token[self._drop(ended)]
            step = self._advance(token[:, None], step, given)
        if torch.isnan(logprobs).any():
            raise NonFiniteError(
                "phase=rollout: log-probs of sampled tokens are nan; lower optimizer.learning_rate or use a wider model.dtype."
            )
        return tokens.T, logprobs.T, lengths

    def _given_ends(self, given: Sequence[int], length: int) -> list[bool]:
        return [given[row] == length for row in self.rows]

    def _drop(self, ended: Sequence[bool]) -> Tensor:
        """Drop the rows that have ended; return (B,) the former places of those that are left.

        Rows from the end take the free places, so that the cache has to move few.
        """
        left = ended.count(False)
        free = [place for place in range(left) if ended[place]]
        movers = [place for place in range(left, len(ended)) if not ended[place]]
        sources = list(range(left))
        for place, mover in zip(free, movers, strict=True):
            sources[place] = mover
        self.cache.keep(sources, self.hidden.device)
        index = torch.tensor(sources, device=self.hidden.device)
        self.rows = [self.rows[place] for place in sources]
        self.index, self.positions = self.index[index], self.positions[index]
        if self.masked:
            self.key_mask, self.key_positions = self.key_mask[index], self.key_positions[index]
        return index

    def _advance(self, token: Tensor, step: int, given: Sequence[int] | None) -> int:
        """Feed `token` (B, 1), the one of number `step`, keep the hidden state that comes out, return the next number."""
        if self.lean is not None:
            self.hidden = self.lean(token, self.positions, self.seen() if self.masked else None)
        else:
            self.hidden = self._next_hidden(token)
        self.positions = self.positions + 1
        return step + 1

    def _next_hidden(self, token: Tensor) -> Tensor:
        position = self.positions[:, None]  # (B, 1)
        run = partial(self.model.hidden_states, token, past_key_values=self.cache, position_ids=position)
        if not self.masked:
            return run()[:, 0]
        architecture = self.model.architecture
        additive = architecture.config._attn_implementation == "eager"  # which adds the mask to the scores
        with decoding_mask(architecture.layers, self.types, self.seen(), self.dtype, additive) as mask:
            return run(attention_mask=mask)[:, 0]

    def seen(self) -> dict[str, Tensor]:
        """Return by layer type (B, S) whether the next token sees each column, its own included."""
        columns = self.cache.get_seq_length() + 1
        mask, seen = self.key_mask[:, :columns], {}
        for kind, window in self.windows.items():
            seen[kind] = mask
            if window is not None:
                seen[kind] = mask & (self.positions[:, None] - self.key_positions[:, :columns] < window)
        return seen


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Return the different prompts, and for each prompt its place among them."""
    places: dict[tuple[int, ...], int] = {}
    sources = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return list(places), sources


def _lean_backbone(model: HydraModel, cache: KVCache | ConcatenatingCache, copies: WeightCopies | None) -> LeanBackbone | None:
    if not isinstance(cache, KVCache) or not supports(model):
        return None
    try:
        return LeanBackbone(model, cache, copies)
    except LookupError:
        if copies is not None:
            raise
        return None


def _processors(settings: RolloutSettings) -> Callable[[Tensor], Tensor] | None:
    """Return what leaves out tokens by top-k and top-p, None where all are kept."""
    processors = LogitsProcessorList()
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        processors.append(TopPLogitsWarper(settings.top_p))
    tokens_so_far: Any = None  # which these two do not look at
    return partial(processors, tokens_so_far) if processors else None


class _History:
    """The tokens of prompts and responses so far, (B, P + steps); room that is not used yet repeats a token of its row."""

    def __init__(self, prompts: Sequence[Sequence[int]], steps: int, device: torch.device) -> None:
        self.start = max(len(prompt) for prompt in prompts)
        width = self.start + steps
        self._ids = torch.tensor([[*prompt, *[prompt[0]] * (width - len(prompt))] for prompt in prompts], device=device)

    def ids(self, rows: Tensor) -> Tensor:
        """Return the tokens of some rows."""
        return self._ids[rows]

    def add(self, step: int, rows: Tensor, tokens: Tensor) -> None:
        """Note a token (B,) of each of the rows."""
        self._ids[rows, self.start + step] = tokens


def _penalised(history: Tensor, penalty: float, keep: Callable[[Tensor], Tensor] | None, logits: Tensor) -> Tensor:
    """Return logits with those of tokens that were there made less likely, then what top-k and top-p leave of them."""
    bent: Tensor = RepetitionPenaltyLogitsProcessor(penalty)(history, logits)
    return bent if keep is None else keep(bent)


@contextmanager
def decoding_attention(model: HydraModel) -> Iterator[None]:
    """Decode without flash-attention, which takes no mask for the holes and has nothing to win on one query.

    Raises:
        UnsupportedModelError: when an old transformers built flash-attention into the layers.
    """
    config = model.architecture.config
    if attention_is_built_in(model.architecture.backbone):
        raise UnsupportedModelError(
            f"model={type(model.causal_lm).__name__} was built with flash-attention in its layers, as transformers below 4.48 "
            "does, and cannot sample; load it with attn_implementation='sdpa' or use a newer transformers."
        )
    # Only flash-attention is left: what the model was built with may have sinks or caps that SDPA does not.
    with attention_of(config, "sdpa") if is_flash(config._attn_implementation) else nullcontext():
        yield
