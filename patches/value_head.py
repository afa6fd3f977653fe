"""Actor and critic as one causal LM with a value head, as TRL's step-style PPO and what builds on it take them.

The classes are children of TRL's own `AutoModelForCausalLMWithValueHead`, which is given by the caller, since TRL asks for
it by name; nothing that TRL's constructor does is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hydra_ppo.errors import RoleError
from hydra_ppo.lazy_logits import LazyLogits
from hydra_ppo.model import HydraModel
from hydra_ppo.views import CausalView, ClassifierView

V = TypeVar("V", bound="ValueHeadView")


def actor_critic(model: HydraModel, parent: type[nn.Module]) -> ActorCritic:
    """Return the actor with the critic's values, a `parent` (TRL's class) that holds the trainable tensors of both roles.

    Memory: two passes a call, one per adapter; with gradients both graphs are alive until the backward pass.
    """
    return subclass(ActorCritic, parent)(model)


def frozen_reference(model: HydraModel, parent: type[nn.Module]) -> FrozenReference:
    """Return the reference, a `parent` (TRL's class) without a parameter."""
    return subclass(FrozenReference, parent)(model)


@cache
def subclass(view: type[V], parent: type[nn.Module]) -> type[V]:
    """Return a class of that name which is a child of both, the same one each time."""
    return type(view.__name__, (view, parent), {"__module__": __name__})


def in_compute_type(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a view's `forward` outside of the host's autocast: the base computes in the type that it was loaded in.

    Hosts need autocast where PEFT's fp32 adapters meet a bf16 base; here they are cast as they are multiplied.
    """

    @wraps(forward)  # TRL reads the names of the arguments
    def outside(self: ValueHeadView, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.hydra.device.type, enabled=False):
            return forward(self, *args, **kwargs)

    return outside


class ValueHeadView(nn.Module):
    """What TRL reads off a model with a value head, whichever role stands behind it."""

    # TRL takes the reference from the actor itself where that is a PEFT model; here it is passed.
    is_peft_model = False
    is_sequential_parallel = False
    is_loaded_in_8bit = False
    is_loaded_in_4bit = False
    supports_rm_adapter = False

    def __init__(self, model: HydraModel, role: str) -> None:
        nn.Module.__init__(self)
        self.pretrained_model = model.views()[role]
        self.config = self.pretrained_model.config

    @property
    def hydra(self) -> HydraModel:
        """The model behind."""
        return self.pretrained_model.hydra

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Checkpoint the base, for all roles."""
        self.pretrained_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.pretrained_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Do nothing: checkpointing that is not reentrant needs no input with a gradient."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return adapters and head of the trainable roles; never the base."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.load_state_dict(self, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapters and heads of all roles, as `HydraModel.save_pretrained` does; never the base."""
        self.hydra.save_pretrained(save_directory)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as `transformers.GenerationMixin.generate` does."""
        return self.pretrained_model.generate(*args, **kwargs)


class ActorCritic(ValueHeadView):
    """Logits of the actor, values of the critic: one adapter each, so a pass each."""

    pretrained_model: CausalView

    def __init__(self, model: HydraModel) -> None:
        super().__init__(model, "actor")
        self.critic: ClassifierView = model.views().critic

    @in_compute_type
    def forward(  # TRL drops the columns of a dataset that are not named here
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **others: Any,
    ) -> tuple[LazyLogits, None, Tensor]:
        """Return lazy logits (B, T, V), None, and values (B, T)."""
        _refuse_cache(past_key_values, return_past_key_values)
        logits = self.pretrained_model(input_ids, attention_mask, **others | {"return_dict": True}).logits
        hidden = self.critic.backbone(input_ids, attention_mask, **others | {"return_dict": True}).last_hidden_state
        return PolicyLogits(logits.hidden, logits.head), None, self.critic.score(hidden)[..., 0]


class FrozenReference(ValueHeadView):
    """Logits of the reference; its values are zeros, which nobody reads."""

    pretrained_model: CausalView

    def __init__(self, model: HydraModel) -> None:
        super().__init__(model, "reference")

    @torch.no_grad()
    @in_compute_type
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **others: Any,
    ) -> tuple[Any, None, Tensor]:
        """Return lazy logits (B, T, V), None, and zeros (B, T)."""
        _refuse_cache(past_key_values, return_past_key_values)
        logits = self.pretrained_model(input_ids, attention_mask, **others | {"return_dict": True}).logits
        return logits, None, logits.hidden.new_zeros(logits.shape[:-1], dtype=torch.float32)


def _refuse_cache(past_key_values: Any, return_past_key_values: bool) -> None:
    if past_key_values is not None or return_past_key_values:
        raise RoleError(
            "forward(past_key_values=...) is not something that a role view does; leave it out, or use generate() to decode "
            "with a cache."
        )


@dataclass(eq=False)
class PolicyLogits(LazyLogits):
    """Lazy logits whose slices share what was learnt with the log-probs: TRL asks for the entropies of another slice.

    Args:
        entropies: those of the last log-probs, (B, R) nats, without a graph.
    """

    entropies: dict[str, Tensor] = field(default_factory=dict)


def logprobs_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return TRL's function of that name for lazy logits too."""

    def logprobs_from_logits(logits: Any, labels: Any, gather: bool = True) -> Any:
        if not isinstance(logits, LazyLogits) or not gather:
            return original(logits, labels, gather)
        found = logits.token_logprobs(labels)
        if isinstance(logits, PolicyLogits):
            logits.entropies["last"] = found.entropy.detach()
        return found.logprobs

    return logprobs_from_logits


def entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return TRL's function of that name, whose result goes into statistics only, for lazy logits too."""

    def entropy_from_logits(logits: Any) -> Any:
        if not isinstance(logits, LazyLogits):
            return original(logits)
        known = logits.entropies.get("last") if isinstance(logits, PolicyLogits) else None
        if known is not None and known.shape == logits.shape[:-1]:
            return known
        return logits.detach().entropy()

    return entropy_from_logits
