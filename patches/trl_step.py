"""TRL's step-style `PPOTrainer`, 0.8 to 0.11: `generate`, score, `step`.

It takes one model with a value head, and a reference. `ActorCritic` and `Reference` are what it gets: the role views in the
shape of `AutoModelForCausalLMWithValueHead`. What is replaced in TRL itself is inert for other models:

- `batched_forward_pass` takes a full log-softmax, at prompts too, and in the update keeps the (B, T, V) logits to take their
  entropy. Here response tokens are looked up once in the vocabulary, which gives both numbers.
- `train_minibatch` goes backward through policy and value loss at once, with both graphs in memory. Here one follows the other,
  and the critic runs when the actor's graph is gone. Where `loss` is the user's own, it gets both.
- `step` runs the reference over rows that the reward view has read before. Their log-probs are kept from that pass.
- `__init__` refuses DeepSpeed and FSDP, which would shard a model whose base they cannot see.

The user scores with `model.views().reward(input_ids, attention_mask).logits[:, 0]`, or with TRL's `compute_reward_score`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from trl import AutoModelForCausalLMWithValueHead
from trl.trainer import ppo_trainer

from hydra_ppo.lazy_logits import Lazy, LazyLogits
from hydra_ppo.logprobs import LMHead
from hydra_ppo.model import HydraModel
from hydra_ppo.patches.binding import Applied, Bindings, install
from hydra_ppo.patches.versions import HostError
from hydra_ppo.views import CausalView, Passes, View

SHARDING = {"ACCELERATE_USE_DEEPSPEED": "deepspeed_plugin", "ACCELERATE_USE_FSDP": "fsdp_plugin"}
"""Accelerate's switches by environment, and by argument."""


def apply(model: HydraModel) -> Applied:
    """Patch the trainer; see `hydra_ppo.patches.trl.apply`."""
    views = model.views()
    passes = views.reference.passes
    if model.roles["reference"].adapter == model.roles["reward"].adapter:
        _known.setdefault(passes, KnownRows())
    arguments = {"model": ActorCritic(passes), "ref_model": Reference(passes)}
    install(ppo_trainer.__name__, lambda bindings: _bind(bindings, ppo_trainer))
    return Applied(ppo_trainer.__name__, arguments)


def _bind(bindings: Bindings, module: ModuleType) -> None:
    trainer = module.PPOTrainer
    bindings.set(trainer, "__init__", _init(trainer.__init__))
    bindings.set(trainer, "batched_forward_pass", _batched_forward_pass(trainer.batched_forward_pass))
    bindings.set(trainer, "train_minibatch", _train_minibatch(trainer.train_minibatch, trainer.loss))
    bindings.set(trainer, "step", _step(trainer.step))
    bindings.set(module, "logprobs_from_logits", _logprobs_from_logits(module.logprobs_from_logits))
    bindings.set(module, "entropy_from_logits", _entropy_from_logits(module.entropy_from_logits))
    bindings.set(Passes, "hidden_states", _hidden_states(Passes.hidden_states))


# -- models --------------------------------------------------------------------------------------------------------------


class StepModel(AutoModelForCausalLMWithValueHead, View):
    """What both models of the trainer share. Of the parent class it is an instance only: nothing of it is initialised.

    `is_peft_model` is False, since the trainer would run such a model with its adapter off as the reference.
    """

    is_peft_model = False
    is_sequential_parallel = False
    is_loaded_in_8bit = False
    is_loaded_in_4bit = False
    supports_rm_adapter = True

    def __init__(self, passes: Passes, role: str) -> None:
        View.__init__(self, passes, role)
        self.pretrained_model: CausalView = getattr(self.hydra.views(), role)
        self.config = self.pretrained_model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as `transformers.GenerationMixin.generate` does; arguments and results are its own."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return (B, T, 1) scores of the reward model at each token, as TRL does for a reward adapter."""
        reward = self.hydra.views().reward
        return reward.score(reward.backbone(input_ids, attention_mask, **others).last_hidden_state)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **_: Any) -> None:
        """Checkpoint the base, for all roles."""
        self.pretrained_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.pretrained_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Do nothing: checkpointing that is not reentrant needs no input with a gradient."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the trainable tensors behind this model, and nothing of the base."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Write adapters and heads of all roles, as `HydraModel.save_pretrained` does; never the base."""
        self.hydra.save_pretrained(save_directory)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        raise HostError(
            "push_to_hub() of a model with a value head would upload the base; use trainer.push_to_hub(...), or upload the "
            "folder that save_pretrained(...) writes."
        )

    def _refuse_cache(self, past_key_values: Any, return_past_key_values: bool) -> None:
        if past_key_values is not None or return_past_key_values:
            raise HostError(
                f"forward(past_key_values=..., return_past_key_values={return_past_key_values}) decodes with a cache, which a "
                "view leaves to generate(); use generate()."
            )


class ActorCritic(StepModel):
    """Actor and critic as one model with a value head: two passes over the base, each with its own adapter.

    Memory: both graphs, until one backward pass. `train_minibatch` has one at a time.
    """

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes, "actor")
        self.critic = self.hydra.views().critic

    @property
    def v_head(self) -> nn.Module:
        return self.critic.score

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[LazyLogits, Tensor | None, Tensor]:
        """Return lazy logits (B, T, V), the loss of `labels` if there are any, and values (B, T)."""
        self._refuse_cache(past_key_values, return_past_key_values)
        found = self.pretrained_model(input_ids, attention_mask, position_ids, **others)
        if self.shares_trunk:
            values = self.critic.score(found.logits.hidden).squeeze(-1)
        else:
            values = self.values(input_ids, attention_mask, position_ids)
        return found.logits, found.loss, values

    @property
    def shares_trunk(self) -> bool:
        """Whether actor and critic train one adapter, so that one pass serves both."""
        return self.hydra.roles["actor"].adapter == self.hydra.roles["critic"].adapter

    def values(self, *inputs: Tensor | None) -> Tensor:
        """Return values (B, T) from the critic's own pass; inputs as of a backbone."""
        return self.critic.score(self.critic.backbone(*inputs).last_hidden_state).squeeze(-1)


class Reference(StepModel):
    """The reference as a model with a value head that is never read: its values are zeros. It has no parameter."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes, "reference")

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[LazyLogits, Tensor | None, Tensor]:
        """Return lazy logits (B, T, V), the loss of `labels` if there are any, and zeros (B, T)."""
        self._refuse_cache(past_key_values, return_past_key_values)
        found = self.pretrained_model(input_ids, attention_mask, position_ids, **others)
        return found.logits, found.loss, found.logits.hidden.new_zeros(found.logits.shape[:-1], dtype=torch.float32)


# -- numbers of response tokens ------------------------------------------------------------------------------------------


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
                "batched_forward_pass, from model.views().reference."
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

    def __iter__(self) -> Iterator[ScoredLogits]:
        return (self[row : row + 1].unscored()[0] for row in range(len(self)))

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
            if len(args[0]) == 1:
                return args[0][0]
            kept = all(part.logits is not None for part in args[0])
            return cls(
                torch.cat([part.logprobs for part in args[0]]),
                torch.cat([part.entropy for part in args[0]]),
                torch.cat([part.logits for part in args[0]]) if kept else None,
            )
        args, kwargs = tree_map(lambda part: part.unscored() if isinstance(part, cls) else part, (args, kwargs or {}))
        return func(*args, **kwargs)


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
        autocast: makes the context that the model runs in.

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
        self.known = _known.get(view.passes) if isinstance(view, Reference) else None
        self.lengths = [(len(query), len(response)) for query, response in zip(queries, responses, strict=True)]

    def eval(self) -> None:
        """Switch the model to evaluation mode."""
        self.model.eval()

    def __call__(self, **inputs: Tensor) -> tuple[ScoredLogits, None, Tensor]:
        """Run the model on the next rows; score their response tokens."""
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        lengths, self.lengths = self.lengths[: len(tokens)], self.lengths[len(tokens) :]
        columns = response_columns(mask, lengths)
        logprobs = self.known.find(tokens, mask) if self.known is not None else None
        if logprobs is not None:
            logprobs = nn.functional.pad(logprobs * columns, (0, 1))
            return ScoredLogits(logprobs, torch.zeros_like(logprobs), None), None, torch.zeros_like(logprobs)
        if not self.defers:
            logits, _, values = self.model(**inputs)
            return score_next(logits, tokens, columns), None, values
        self.deferred.append(partial(self._values, tokens, mask))
        with self.autocast():
            logits = self.model.pretrained_model(tokens, mask).logits
        return score_next(logits, tokens, columns), None, torch.zeros_like(mask)

    def _values(self, tokens: Tensor, mask: Tensor) -> Tensor:
        with self.autocast():
            return self.model.values(tokens, mask).float()


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


def score_next(logits: LazyLogits, tokens: Tensor, columns: Tensor) -> ScoredLogits:
    """Look up next tokens of logits (B, T, V) in the columns (B, T - 1) that count.

    Memory: as `token_logprobs` for that many positions.
    """
    found = logits[:, :-1][columns].token_logprobs(tokens[:, 1:][columns])
    zeros = found.logprobs.new_zeros(columns.shape)
    logprobs, entropy = (zeros.masked_scatter(columns, numbers) for numbers in (found.logprobs, found.entropy.detach()))
    return ScoredLogits(nn.functional.pad(logprobs, (0, 1)), nn.functional.pad(entropy, (0, 1)), logits)


# -- reference log-probs from the reward's pass --------------------------------------------------------------------------


class KnownRows:
    """Reference log-probs of the rows that the reward view has read: the same pass gives both. For one step.

    Memory: a number per token.
    """

    def __init__(self) -> None:
        self.used = 0
        self._rows: dict[tuple[int, bytes], Tensor] = {}
        self._wanted = True

    @torch.no_grad()
    def remember(self, hidden: Tensor, tokens: Tensor, attention_mask: Tensor | None, head: LMHead) -> bool:
        """Keep log-probs of the tokens (B, T) from hidden states (B, T, H); False where that is not worth it."""
        if not self._wanted:
            return False
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        kept = mask.bool()
        logprobs = score_next(LazyLogits(hidden, head), tokens, kept[:, 1:] & kept[:, :-1]).logprobs
        for row, place in zip(logprobs, _places(tokens, mask), strict=True):
            if place is not None:
                key, columns = place
                self._rows[key] = row[columns]
        return True

    def find(self, tokens: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Return log-probs (B, T - 1) of the next tokens; None where a row was not read, at these positions."""
        places = _places(tokens, attention_mask)
        if any(place is None or place[0] not in self._rows for place in places):
            return None
        found = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, device=tokens.device)
        for row, (key, columns) in zip(found, places, strict=True):
            row[columns] = self._rows[key]
        self.used += len(places)
        return found

    def end_step(self) -> None:
        """Forget the rows. If none was asked for, the user scores other tokens than those: keep none any more."""
        if self._rows and not self.used:
            self._wanted = False
        self._rows.clear()


_known: WeakKeyDictionary[Passes, KnownRows] = WeakKeyDictionary()


def _places(tokens: Tensor, attention_mask: Tensor) -> list[tuple[tuple[int, bytes], slice] | None]:
    """Return for each row what identifies it (its tokens and the first one's column) and the columns before its next tokens.

    None where padding stands between tokens.
    """
    places: list[tuple[tuple[int, bytes], slice] | None] = []
    for row, kept in zip(tokens.cpu(), attention_mask.bool().cpu(), strict=True):
        columns = kept.nonzero()[:, 0].tolist()
        if not columns or columns[-1] - columns[0] + 1 != len(columns):
            places.append(None)
            continue
        key = columns[0], row[columns[0] : columns[-1] + 1].numpy().tobytes()
        places.append((key, slice(columns[0], columns[-1])))
    return places


# -- what is bound -------------------------------------------------------------------------------------------------------


def _init(original: Any) -> Any:
    @wraps(original)
    def init(self: Any, config: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, StepModel):
            refuse_sharding(config)
        original(self, config, model, *args, **kwargs)

    return init


def refuse_sharding(config: Any) -> None:
    """Raise HostError where accelerate would shard parameters."""
    for variable, argument in SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1") or argument in getattr(config, "accelerator_kwargs", {}):
            raise HostError(
                f"{variable}=true shards the parameters of the trainer's model, but a role view has its adapters only, and the "
                "base stays whole; run on one process, or with plain data parallelism."
            )


def _batched_forward_pass(original: Any) -> Any:
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


def _train_minibatch(original: Any, loss: Any) -> Any:
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


def _step(original: Any) -> Any:
    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = self.accelerator.unwrap_model(self.model)
        known = _known.get(view.passes) if isinstance(view, StepModel) else None
        try:
            return original(self, *args, **kwargs)
        finally:
            if known is not None:
                known.end_step()

    return step


def _logprobs_from_logits(original: Any) -> Any:
    @wraps(original)
    def logprobs_from_logits(logits: Any, labels: Any, gather: bool = True) -> Any:
        if isinstance(logits, ScoredLogits) and gather:
            return logits.logprobs
        return original(logits, labels, gather=gather)

    return logprobs_from_logits


def _entropy_from_logits(original: Any) -> Any:
    @wraps(original)
    def entropy_from_logits(logits: Any) -> Any:
        # The trainer's own loss is who asks here: it reports the entropy, without its gradient.
        if isinstance(logits, ScoredLogits):
            return logits.entropy
        return logits.detach().entropy() if isinstance(logits, LazyLogits) else original(logits)

    return entropy_from_logits


def _hidden_states(original: Any) -> Any:
    @wraps(original)
    def hidden_states(
        self: Passes, role: str, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        hidden = original(self, role, input_ids, attention_mask, position_ids)
        known = _known.get(self) if role == "reward" and position_ids is None else None
        if known is not None and known.remember(hidden, input_ids, attention_mask, self.model.architecture.lm_head()):
            self.forget()
        return hidden

    return hidden_states
