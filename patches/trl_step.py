"""TRL's step-style `PPOTrainer`, 0.8 to 0.11: `generate`, score, `step`.

It takes one model with a value head, and a reference: the role views in that shape, see `value_head`. What is replaced in TRL
itself is inert for other models:

- `batched_forward_pass` takes a full log-softmax, at prompts too, and in the update keeps the (B, T, V) logits to take their
  entropy. Here response tokens are looked up once in the vocabulary, which gives both numbers.
- `train_minibatch` goes backward through policy and value loss at once, with both graphs in memory. Here one follows the other,
  and the critic runs when the actor's graph is gone. Where `loss` is the user's own, it gets both.
- `step` runs the reference over rows that the reward view has read before. Their log-probs are kept from that pass.
- `__init__` refuses DeepSpeed and FSDP, which would shard a model whose base they cannot see.

The user scores with `role_views(model).reward(input_ids, attention_mask).logits[:, 0]`, or with TRL's `compute_reward_score`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches.binding import Applied, Bindings, install
from hydra_ppo.patches.known_rows import KnownRows
from hydra_ppo.patches.scored_logits import entropy_from_logits, logprobs_from_logits
from hydra_ppo.patches.step_passes import batched_forward_pass, train_minibatch
from hydra_ppo.patches.value_head import StepModel, actor_critic, frozen_reference
from hydra_ppo.patches.versions import HostError
from hydra_ppo.views.views import role_views

SHARDING = {"ACCELERATE_USE_DEEPSPEED": "deepspeed_plugin", "ACCELERATE_USE_FSDP": "fsdp_plugin"}
"""Accelerate's switches by environment, and by argument."""


class AppliedToStep(Applied):
    """As `Applied`; stops keeping rows, too, when it is undone."""

    def __init__(self, host: str, arguments: Mapping[str, Any], known: KnownRows) -> None:
        super().__init__(host, arguments)
        self._known = known
        known.start()

    def undo(self) -> None:
        """Leave the host and the model's views as they were found. A second call does nothing."""
        self._known.stop()
        super().undo()


def apply(model: HydraModel) -> Applied:
    """Patch the trainer; see `hydra_ppo.patches.trl.apply`."""
    known = KnownRows(role_views(model).reference.passes)
    parent = import_module("trl").AutoModelForCausalLMWithValueHead
    arguments = {"model": actor_critic(known, parent), "ref_model": frozen_reference(known, parent)}
    return AppliedToStep(_install(), arguments, known)


def install_trainer() -> Applied:
    """Patch the trainer without models, for hosts that build it themselves; undone as what `apply` returns."""
    return Applied(_install(), {})


def _install() -> str:
    module = import_module("trl.trainer.ppo_trainer")
    install(module.__name__, lambda bindings: _bind(bindings, module))
    return module.__name__


def _bind(bindings: Bindings, module: ModuleType) -> None:
    trainer = module.PPOTrainer
    bindings.set(trainer, "__init__", _init(trainer.__init__))
    bindings.set(trainer, "batched_forward_pass", batched_forward_pass(trainer.batched_forward_pass))
    bindings.set(trainer, "train_minibatch", train_minibatch(trainer.train_minibatch, trainer.loss))
    bindings.set(trainer, "step", _step(trainer.step))
    bindings.set(module, "logprobs_from_logits", logprobs_from_logits(module.logprobs_from_logits))
    bindings.set(module, "entropy_from_logits", entropy_from_logits(module.entropy_from_logits))


def _init(original: Callable[..., None]) -> Callable[..., None]:
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


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = self.accelerator.unwrap_model(self.model)
        try:
            return original(self, *args, **kwargs)
        finally:
            if isinstance(view, StepModel):
                view.known.end_step()

    return step
