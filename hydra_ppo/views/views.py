"""Role views: each role of a HydraModel as the Hugging Face model that outside code expects.

`view` has what they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from hydra_ppo.errors import RoleError
from hydra_ppo.model.heads import mean_weight
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.passes import Passes
from hydra_ppo.views.view import BackboneView, RoleView

ROLES = ("actor", "reference", "critic", "reward")
KEPT = "role views"


def role_views(model: HydraModel) -> Views:
    """Return the roles of a model as Hugging Face models, for code that expects four; the same objects each time.

    Raises:
        RoleError: when the model is not at stage `ppo`, or its critic's values are bounded.
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
        if model.value_range is not None:
            raise RoleError(
                f"role_views(): value_range={list(model.value_range)} bounds the critic's values, which no classifier says; "
                "call model.bound_values(None) to have the head alone."
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
        self.in_features, self.out_features = head.in_features, 1
        if trained:
            self.weight = head.weight
        else:  # an attribute like any other: nobody's parameter
            object.__setattr__(self, "weight", head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight)


class RewardHead(nn.Module):
    """What a classifier can say of a reward head that is more than one linear layer: the mean of its members.

    Args:
        head: several members, which are not trained through a view.
        expects: scores are what is above the expected reward of a prompt, which no classifier sees: nothing is said then.
    """

    def __init__(self, head: nn.Linear, expects: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, 1
        self.expects = expects
        self._behind = (head,)  # in a tuple: no submodule of the view

    @property
    def weight(self) -> Tensor:
        """The mean of the members (1, H), wherever they are now."""
        return mean_weight(self._behind[0].weight).detach()

    def forward(self, hidden: Tensor) -> Tensor:
        if self.expects:
            raise RoleError(
                "a view of the reward model cannot tell what is above a prompt's expected reward (reward_loss='advantage'); "
                "use HydraModel.scores, or a reward model of another loss."
            )
        return nn.functional.linear(hidden.float(), self.weight)


def _score_head(hydra: HydraModel, role: str) -> nn.Module:
    """Return the head of a role as a classifier has it.

    Raises:
        RoleError: for several reward heads that are to be trained.
    """
    name, trained = hydra.roles[role].head, role in hydra.trainable_roles
    head = hydra.heads[name]
    if name != "reward" or (head.out_features == 1 and not hydra.expects):
        return ScoreHead(head, trained)
    if trained:
        raise RoleError(f"role={role!r}: views train no ensemble of reward heads; train it with hydra-ppo sft.")
    return RewardHead(head, hydra.expects)


class ClassifierView(RoleView):
    """Critic or reward model as a sequence classifier with one label: `score` over the backbone."""

    num_labels = 1

    def __init__(self, passes: Passes, role: str) -> None:
        super().__init__(passes, role)
        self.score = _score_head(self.hydra, role)
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

        Without an attention mask every token counts.

        Raises:
            RoleError: where rows without a mask end in the pad token: that may be padding, or the end that is to be read.
        """
        found = self.backbone(input_ids, attention_mask, position_ids, output_hidden_states, **others)
        assert input_ids is not None
        counts = attention_mask
        if counts is None:
            if self.config.pad_token_id is not None and bool((input_ids[:, -1] == self.config.pad_token_id).any()):
                raise RoleError(
                    f"attention_mask=None: rows end in {self.config.pad_token_id}, the pad token, which may be padding or the "
                    "end of an answer; pass the mask."
                )
            counts = torch.ones_like(input_ids)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * counts.bool()).argmax(dim=1)  # (B,)
        hidden = found.last_hidden_state[torch.arange(len(last), device=last.device), last]  # (B, H)
        output = SequenceClassifierOutputWithPast(logits=self.score(hidden), hidden_states=found.hidden_states)
        return output.to_tuple() if return_dict is False else output
