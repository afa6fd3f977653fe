"""Role views: each role of a HydraModel as the Hugging Face model that outside code expects.

A view is a module that owns its role's trainable tensors and nothing else. The base is reached through the HydraModel, so
whatever a host does to its four models (move, count, wrap, save), there is one base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from hydra_ppo.errors import RoleError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.passes import Passes

ROLES = ("actor", "reference", "critic", "reward")
KEPT = "role views"


def role_views(model: HydraModel) -> Views:
    """Return the roles of a model as Hugging Face models, for code that expects four; the same objects each time.

    Raises:
        RoleError: when the model is not at stage `ppo`.
    """
    if KEPT not in model.kept:
        model.kept[KEPT] = Views(model)
    found: Views = model.kept[KEPT]
    return found


class Views(Mapping[str, "RoleView"]):
    """The four role views of one model; also by name, `views["critic"]`.

    Attributes:
        actor: causal LM, trainable.
        reference: causal LM, without a parameter.
        critic: sequence classifier whose `score` is the value head, trainable.
        reward: sequence classifier whose `score` is the reward head, without a parameter.
    """

    def __init__(self, model: HydraModel) -> None:
        if missing := [role for role in ROLES if role not in model.roles]:
            raise RoleError(
                f"role_views() needs the role {missing[0]!r}, which does not exist at stage {model.train_stage!r}; build the "
                "model with train='ppo'."
            )
        passes = Passes(model)
        self.actor = CausalView(passes, "actor")
        self.reference = CausalView(passes, "reference")
        self.critic = ClassifierView(passes, "critic")
        self.reward = ClassifierView(passes, "reward")

    def __getitem__(self, role: str) -> RoleView:
        if role not in ROLES:
            raise KeyError(role)
        return getattr(self, role)

    def __iter__(self) -> Iterator[str]:
        return iter(ROLES)

    def __len__(self) -> int:
        return len(ROLES)


class LastHiddenState(Sequence[Tensor]):
    """What stands for the tuple of all hidden states: the last one only, at index -1.

    All of them would be (L + 1) tensors of (B, T, H) for hosts that read one.
    """

    def __init__(self, hidden: Tensor, layers: int) -> None:
        self.hidden = hidden
        self.layers = layers

    def __len__(self) -> int:
        return self.layers + 1

    def __getitem__(self, index: Any) -> Any:
        if index in (-1, self.layers):
            return self.hidden
        raise RoleError(
            f"hidden_states[{index}] is not kept by a role view, only the last one is; read hidden_states[-1], or run "
            "model.causal_lm inside `with model.role(...)`."
        )


class View(nn.Module):
    """What all views share: one model behind them, which nothing that is done to a view does twice."""

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__()
        self.role = role
        self._behind = (passes,)  # in a tuple: the model is no submodule of its views

    @property
    def passes(self) -> Passes:
        return self._behind[0]

    @property
    def hydra(self) -> HydraModel:
        """The model behind the view."""
        return self.passes.model

    @property
    def device(self) -> torch.device:
        return self.hydra.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hydra.causal_lm.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the model behind, once: a second view finds it where it should be.

        Raises:
            RoleError: for a cast, which would round the adapters.
        """
        before = torch.empty(0, device=self.device)
        after = fn(before)
        if after.dtype != before.dtype:
            raise RoleError(
                f"{type(self).__name__}.to({after.dtype}) would round the fp32 adapters; set the base's type where it is "
                "loaded: HydraModel.from_pretrained(..., dtype=...)."
            )
        if after.device != before.device:
            cast(Any, self.hydra)._apply(fn)  # torch leaves it without types
        return self

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RoleError(
            f"deepcopy({type(self).__name__} {self.role!r}) would copy the base that all roles share; pass views of one model, "
            "reference included, where the host copies its policy."
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RoleError(
            f"pickle({type(self).__name__} {self.role!r}) would write the base; use save_pretrained, which writes the adapters."
        )


class BackboneView(View):
    """The base without a head, in one role; holds the role's adapter where that is trainable."""

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__(passes, role)
        if role in self.hydra.trainable_roles:
            for name, parameter in self.hydra.role_parameters(role).items():
                if "lora_" in name:
                    _register(self, name.removeprefix(f"{role}.base_model.model.").replace(".{}.", "."), parameter)

    @property
    def config(self) -> Any:
        return self.hydra.architecture.backbone.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Run the base. Shapes as in Hugging Face models; `hidden_states` has the last one only."""
        if input_ids is None:
            raise RoleError(f"input_ids=None: a view of role {self.role!r} runs on token ids; pass input_ids.")
        _refuse(others)
        hidden = self.passes.hidden_states(self.role, input_ids, attention_mask, position_ids)
        states = LastHiddenState(hidden, len(self.hydra.architecture.layers)) if output_hidden_states else None
        output = BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=cast(Any, states))
        return (hidden,) if return_dict is False else output


class RoleView(View):
    """A backbone under the attribute that Hugging Face uses for this family, with what a head needs beside it."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__(passes, role)
        causal_lm = self.hydra.causal_lm
        self.base_model_prefix: str = causal_lm.base_model_prefix
        self.add_module(self.base_model_prefix, BackboneView(passes, role))
        self.config = causal_lm.config
        self.name_or_path = causal_lm.name_or_path
        self.warnings_issued: dict[str, bool] = {}  # a scratch pad of transformers' Trainer

    @property
    def backbone(self) -> BackboneView:
        return getattr(self, self.base_model_prefix)

    @property
    def base_model(self) -> BackboneView:
        return self.backbone

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.hydra.checkpointing

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Checkpoint the base, for all roles.

        Raises:
            RoleError: for reentrant checkpointing.
        """
        self.hydra.enable_checkpointing(True, use_reentrant=bool((gradient_checkpointing_kwargs or {}).get("use_reentrant")))

    def gradient_checkpointing_disable(self) -> None:
        self.hydra.enable_checkpointing(False)

    # The names of transformers 5.19 and on.
    is_activation_checkpointing = is_gradient_checkpointing
    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def enable_input_require_grads(self) -> None:
        """Do nothing: checkpointing that is not reentrant needs no input with a gradient."""

    def get_input_embeddings(self) -> nn.Module:
        return self.hydra.causal_lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.hydra.causal_lm.get_output_embeddings()

    def add_model_tags(self, tags: Any) -> None:
        """Do nothing: tags belong on a model card of the hub, which nobody pushes to from here."""

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapters and heads of all roles, once, as `HydraModel.save_pretrained` does; never the base."""
        self.hydra.save_pretrained(save_directory)


class CausalView(RoleView):
    """Actor or reference as a causal LM. Its logits are lazy: see `LazyLogits`."""

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__(passes, role)
        self.generation_config = deepcopy(self.hydra.causal_lm.generation_config)
        self._disabled = False
        self._reference = (BackboneView(passes, "reference"),)  # in a tuple: no submodule of this view

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Run the base.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), padding on either side.
            position_ids: (B, T).
            labels: (B, T), -100 where nothing is asked; gives the mean loss of next tokens.
            output_hidden_states: return the last hidden state as `hidden_states[-1]`.
            return_dict: False returns a tuple.

        Returns:
            CausalLMOutputWithPast whose `logits` are lazy, (B, T, V).

        Raises:
            RoleError: for caches, embeddings as inputs, and what else a view does not do.
        """
        backbone = self._reference[0] if self._disabled else self.backbone
        found = backbone(input_ids, attention_mask, position_ids, output_hidden_states, **others)
        logits = LazyLogits(found.last_hidden_state, self.hydra.architecture.lm_head())
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=cast(Any, logits), hidden_states=found.hidden_states)
        if return_dict is False:
            return tuple(part for part in (loss, logits, found.hidden_states) if part is not None)
        return output

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample as `transformers.GenerationMixin.generate` does; arguments and results are its own."""
        self.passes.forget()
        causal_lm: Any = self.hydra.causal_lm  # generate() is not a part of every PreTrainedModel
        # Not as an argument, which would not go together with others: it is where defaults come from.
        before, causal_lm.generation_config = causal_lm.generation_config, self.generation_config
        try:
            with self.hydra.role("reference" if self._disabled else self.role):
                return causal_lm.generate(*args, **kwargs)
        finally:
            causal_lm.generation_config = before

    def can_generate(self) -> bool:
        return True

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self.hydra.causal_lm).prepare_inputs_for_generation(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the reference inside the block, as a PEFT model with its adapter off."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before


class ScoreHead(nn.Module):
    """A scalar head (..., H) -> (..., 1), fp32; its weight is the model's own, a parameter where it is trained."""

    def __init__(self, head: nn.Linear, trained: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        if trained:
            self.weight = head.weight
        else:  # an attribute like any other: nobody's parameter
            object.__setattr__(self, "weight", head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight)


class ClassifierView(RoleView):
    """Critic or reward model as a sequence classifier with one label: `score` over the backbone."""

    num_labels = 1

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__(passes, role)
        head = self.hydra.heads[self.hydra.roles[role].head]
        self.score = ScoreHead(head, trained=role in self.hydra.trainable_roles)
        self.config = deepcopy(self.config)
        self.config.num_labels = 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Return SequenceClassifierOutputWithPast whose `logits` (B, 1) are the score at the last token of each row.

        Without an attention mask, the last token that is not `config.pad_token_id` counts.
        """
        found = self.backbone(input_ids, attention_mask, position_ids, output_hidden_states, **others)
        assert input_ids is not None
        counts = attention_mask
        if counts is None:
            pad = self.config.pad_token_id
            counts = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * counts.bool()).argmax(dim=1)  # (B,)
        hidden = found.last_hidden_state[torch.arange(len(last), device=last.device), last]  # (B, H)
        output = SequenceClassifierOutputWithPast(logits=self.score(hidden), hidden_states=found.hidden_states)
        return output.to_tuple() if return_dict is False else output


def _register(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register `parameter` under the dotted `path`, with empty modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    module.register_parameter(name, parameter)


IGNORED = {"use_cache": (None, False), "output_attentions": (None, False)}
"""Arguments of Hugging Face forward passes that views take with these values only."""


def _refuse(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value not in IGNORED.get(name, (None,)):
            raise RoleError(
                f"forward({name}=...) is not something that a role view does; leave it out, use generate() to decode with a "
                "cache, or run model.causal_lm inside `with model.role(...)`."
            )
