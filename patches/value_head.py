"""Role views in the shape of TRL's models with a value head, as step-style PPO and what builds on it take them.

TRL asks for its own `AutoModelForCausalLMWithValueHead` by name. The classes here become children of it, and of `View`, when
the caller gives that class; nothing that TRL's constructor does is done.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hydra_ppo.patches.known_rows import KnownRows
from hydra_ppo.patches.versions import HostError
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.passes import Passes
from hydra_ppo.views.view import View
from hydra_ppo.views.views import CausalView, ClassifierView, role_views

S = TypeVar("S", bound="StepModel")


def actor_critic(known: KnownRows, parent: type[nn.Module], autocast: bool = True) -> ActorCritic:
    """Return actor and critic as one model.

    Args:
        known: rows of the model's passes.
        parent: TRL's class.
        autocast: whether passes run in the host's autocast, or in the type of the base whatever the host says.
    """
    return _child(ActorCritic, parent)(known, autocast)


def frozen_reference(known: KnownRows, parent: type[nn.Module], autocast: bool = True) -> FrozenReference:
    """Return the reference, without a parameter. Arguments as of `actor_critic`."""
    return _child(FrozenReference, parent)(known, autocast)


@cache
def _child(kind: type[S], parent: type[nn.Module]) -> type[S]:
    # `View` last: its constructor goes on to that of nn.Module, not to the parent's.
    return type(kind.__name__, (kind, parent, View), {"__module__": __name__})


def precision(view: View, autocast: bool) -> AbstractContextManager[Any]:
    """Return the context of a pass: the host's autocast, or none."""
    return nullcontext() if autocast else torch.autocast(view.device.type, enabled=False)


class StepModel:
    """What both models share. Mixed with TRL's class and `View`.

    `is_peft_model` is False, since the trainer would run such a model with its adapter off as the reference.
    """

    is_peft_model = False
    is_sequential_parallel = False
    is_loaded_in_8bit = False
    is_loaded_in_4bit = False
    supports_rm_adapter = True

    passes: Passes
    hydra: Any

    def __init__(self, known: KnownRows, role: str, autocast: bool) -> None:
        View.__init__(self, known.passes, role)
        self.known = known
        self.autocast = autocast
        self.pretrained_model: CausalView = getattr(role_views(self.hydra), role)
        self.config = self.pretrained_model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as `transformers.GenerationMixin.generate` does; arguments and results are its own."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(  # the trainer drops the columns of a dataset that are not named here
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[LazyLogits, Tensor | None, Tensor]:
        """Return lazy logits (B, T, V), the loss of `labels` if there are any, and values (B, T).

        Raises:
            HostError: when asked to decode with a cache.
        """
        if past_key_values is not None or return_past_key_values:
            raise HostError(
                f"forward(past_key_values=..., return_past_key_values={return_past_key_values}) decodes with a cache, which a "
                "view leaves to generate(); use generate()."
            )
        found = self._run(input_ids, attention_mask, position_ids=position_ids, **others)
        return found.logits, found.loss, self._values_beside(found.logits, input_ids, attention_mask, position_ids)

    def _values_beside(self, logits: LazyLogits, *inputs: Tensor | None) -> Tensor:
        """Return values (B, T) for a pass that gave `logits`, of the same inputs as a backbone takes."""
        raise NotImplementedError

    def logits(self, *inputs: Tensor | None) -> LazyLogits:
        """Return lazy logits (B, T, V) of the role's pass; inputs as of a causal LM."""
        return self._run(*inputs).logits

    def _run(self, *inputs: Tensor | None, **others: Any) -> Any:
        with precision(self, self.autocast):
            return self.pretrained_model(*inputs, **others | {"return_dict": True})

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return (B, T, 1) scores of the reward model at each token, as TRL does for a reward adapter."""
        reward = role_views(self.hydra).reward
        with precision(self, self.autocast):
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

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.load_state_dict(self, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapters and heads of all roles, as `HydraModel.save_pretrained` does; never the base."""
        self.hydra.save_pretrained(save_directory)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        raise HostError(
            "push_to_hub() of a model with a value head would upload the base; use trainer.push_to_hub(...), or upload the "
            "folder that save_pretrained(...) writes."
        )


class ActorCritic(StepModel):
    """Actor and critic as one model with a value head: two passes over the base, each with its own adapter.

    Memory: both graphs, until one backward pass. The patched `train_minibatch` has one at a time.
    """

    def __init__(self, known: KnownRows, autocast: bool) -> None:
        super().__init__(known, "actor", autocast)
        self.critic: ClassifierView = role_views(self.hydra).critic

    @property
    def v_head(self) -> nn.Module:
        return self.critic.score

    def _values_beside(self, logits: LazyLogits, *inputs: Tensor | None) -> Tensor:
        if not self.shares_trunk:
            return self.values(*inputs)
        with precision(self, self.autocast):
            return self.critic.score(logits.hidden).squeeze(-1)

    @property
    def shares_trunk(self) -> bool:
        """Whether actor and critic train one adapter, so that one pass serves both."""
        return self.hydra.roles["actor"].adapter == self.hydra.roles["critic"].adapter

    def values(self, *inputs: Tensor | None) -> Tensor:
        """Return values (B, T) from the critic's own pass; inputs as of a backbone."""
        with precision(self, self.autocast):
            return self.critic.score(self.critic.backbone(*inputs).last_hidden_state).squeeze(-1)


class FrozenReference(StepModel):
    """The reference as a model with a value head that is never read: its values are zeros. It has no parameter."""

    def __init__(self, known: KnownRows, autocast: bool) -> None:
        super().__init__(known, "reference", autocast)

    def _values_beside(self, logits: LazyLogits, *inputs: Tensor | None) -> Tensor:
        return logits.hidden.new_zeros(logits.shape[:-1], dtype=torch.float32)


class TokenScores(View):
    """The reward model's score at every token, where TRL and its kin look for a value."""

    def __init__(self, passes: Passes, autocast: bool = True) -> None:
        super().__init__(passes, "reward")
        self.autocast = autocast
        self.pretrained_model: ClassifierView = role_views(self.hydra).reward
        self.config = self.pretrained_model.config

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> tuple[None, None, Tensor]:
        """Return None, None, and scores (B, T)."""
        view = self.pretrained_model
        with precision(self, self.autocast):
            hidden = view.backbone(input_ids, attention_mask, **others | {"return_dict": True}).last_hidden_state
            return None, None, view.score(hidden)[..., 0]
