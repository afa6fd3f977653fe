"""How the step-style trainer runs role views: response tokens looked up once, the critic after the actor's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hydra_ppo.patches.scored_logits import ScoredLogits, response_columns, score_next
from hydra_ppo.patches.value_head import ActorCritic, FrozenReference, StepModel
from hydra_ppo.views.lazy import Lazy


class DeferredValues(Lazy):
    """Values (B, T - 1) of an update, whose pass runs when they are needed."""

    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, passes: list[Callable[[], Tensor]]) -> None:
        self.passes = passes
        self._values: Tensor | None = None

    def materialize(self, why: str = "materialize") -> Tensor:
        if self._values is None:
            self._values = torch.cat([run() for run in self.passes])[:, :-1]
            self.passes = []
        return self._values


class ResponsePasses:
    """Stands for the model in `batched_forward_pass`, which runs it on its rows in order, some at a time.

    Args:
        model: as the trainer holds it.
        view: what it is when unwrapped.
        queries: of all rows.
        responses: of all rows.
        autocast: makes the context that the trainer's model runs in.

    Attributes:
        deferred: passes of the critic that were left for later, while an update's graph of the actor is in memory.
    """

    def __init__(
        self, model: nn.Module, view: StepModel, queries: list[Tensor], responses: list[Tensor], autocast: Callable[[], Any]
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.deferred: list[Callable[[], Tensor]] = []
        # Of a model that is wrapped, for data parallelism, each forward pass belongs to one backward pass.
        alone = isinstance(view, ActorCritic) and model is view and not view.shares_trunk
        self.defers = alone and torch.is_grad_enabled()
        self.known = view.known if isinstance(view, FrozenReference) else None
        self.lengths = [(len(query), len(response)) for query, response in zip(queries, responses, strict=True)]

    def eval(self) -> None:
        """Switch the model to evaluation mode."""
        self.model.eval()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> tuple[ScoredLogits, None, Tensor]:
        """Run the model on the next rows; score their response tokens."""
        lengths, self.lengths = self.lengths[: len(input_ids)], self.lengths[len(input_ids) :]
        columns = response_columns(attention_mask, lengths)
        logprobs = self.known.find(input_ids, attention_mask) if self.known is not None else None
        if logprobs is not None:
            logprobs = nn.functional.pad(logprobs * columns, (0, 1))
            return ScoredLogits(logprobs, torch.zeros_like(logprobs), None), None, torch.zeros_like(logprobs)
        if not self.defers:
            logits, _, values = self.model(input_ids=input_ids, attention_mask=attention_mask, **others)
            return score_next(logits, input_ids, columns), None, values
        self.deferred.append(partial(self._values, input_ids, attention_mask))
        with self.autocast():
            logits = self.model.logits(input_ids, attention_mask)
        return score_next(logits, input_ids, columns), None, torch.zeros_like(attention_mask)

    def _values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with self.autocast():
            return self.model.values(input_ids, attention_mask).float()


# -- what is bound -------------------------------------------------------------------------------------------------------


def batched_forward_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the trainer's method of that name, inert for models that are not role views."""

    @wraps(original)
    def batched_forward_pass(
        self: Any,
        model: Any,
        queries: Any,
        responses: Any,
        model_inputs: Any,
        return_logits: bool = False,
        response_masks: Any = None,
    ) -> Any:
        view = self.accelerator.unwrap_model(model)
        rest = {"return_logits": return_logits, "response_masks": response_masks}
        if not isinstance(view, StepModel):
            return original(self, model, queries, responses, model_inputs, **rest)
        if return_logits and not torch.is_grad_enabled():  # kl_penalty="full" reads whole distributions, row by row
            logprobs, logits, values, masks = original(self, model, queries, responses, model_inputs, **rest)
            return logprobs * masks, logits, values, masks  # prompts 0, as in the update: their ratio must stay finite
        passes = ResponsePasses(model, view, queries, responses, self.accelerator.autocast)
        logprobs, logits, values, masks = original(self, passes, queries, responses, model_inputs, **rest)
        return logprobs, logits, DeferredValues(passes.deferred) if passes.deferred else values, masks

    return batched_forward_pass


def train_minibatch(original: Callable[..., Any], loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the trainer's method of that name, which goes backward through policy and value loss one after the other.

    Args:
        original: is left to do the rest.
        loss: the trainer's own; where a user has another, it gets both graphs at once.
    """

    @wraps(original)
    def train_minibatch(
        self: Any,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Any,
        vpreds: Any,
        *others: Tensor,
    ) -> Any:
        # The policy loss of TRL's own `loss` does not depend on the values, nor the value loss on the log-probs.
        if isinstance(vpreds, DeferredValues) and isinstance(logits, ScoredLogits) and type(self).loss is loss:
            policy_loss, _, _ = self.loss(old_logprobs, values, logits, values, logprobs, *others)
            self.accelerator.backward(policy_loss)
            logprobs, logits.logits = logprobs.detach(), None
            vpreds = vpreds.materialize()
        return original(self, old_logprobs, values, logprobs, logits, vpreds, *others)

    return train_minibatch
