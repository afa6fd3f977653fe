"""What all role views share: a module that owns its role's trainable tensors and nothing else.

The base is reached through the HydraModel, so whatever a host does to its four models (move, count, wrap, save), there is one
base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from hydra_ppo.errors import RoleError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.views.passes import Passes


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
