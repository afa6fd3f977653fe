"""RoleModel: one base in memory that is whichever role is in force, and its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, get_ident
from typing import Any, Self, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.compute.logprobs import TokenLogprobs, token_logprobs
from hydra_ppo.compute.packing import Packing, States, attention_of, packing_attention, worth_packing
from hydra_ppo.compute.recompute import enable_recompute
from hydra_ppo.compute.trunk import Trunk
from hydra_ppo.errors import RoleError, UnsupportedModelError
from hydra_ppo.experience import Sequences
from hydra_ppo.model.adapters import AdapterSwitch, adapter_parameters
from hydra_ppo.model.architecture import Architecture, keep_quantised_layers_trainable
from hydra_ppo.model.head_reading import HeadReading
from hydra_ppo.model.heads import Heads, Readings, read_all
from hydra_ppo.model.positions import rope_limit
from hydra_ppo.model.roles import Role, Stage

Read = TypeVar("Read")

_ENTERING = Lock()
"""Held while a role is entered. None of a model's own: a model can be copied and pickled."""


class RoleModel(HeadReading):
    """A base with adapters and scalar heads, and a table that says what each role uses of them.

    `HydraModel` builds one. Here is what it does once it stands: which parameters receive gradients, which role is in
    force, and the passes in that role.

    Args:
        architecture: where the parts of the base are.
        base: the same base, adapters of all roles injected.
        stage: roles, and which of them are trained.
        heads: a linear layer (fp32) for each scalar head, see `heads`.
        trunk_layers: adapters sit on the decoder layers above this many.
        packing: whether to run rows end to end where the attention can.
        autocast: compute type of a base that is itself trained; None where the base has its own.

    Attributes:
        reward_head_trained: whether the reward head says anything yet.
        trained_end: the token that training answers ended in, at which the reward head is read; None where nobody said.
        template: digest of the chat template that training texts were put into; None where there was none, or nobody said.
        kept: what rooms above this one made for this model and want to find again; no submodule, and never saved.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: PreTrainedModel | PeftModel,
        stage: Stage,
        heads: dict[str, nn.Linear],
        *,
        trunk_layers: int,
        packing: bool,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.architecture, self.base, self.stage = architecture, base, stage
        self.roles = dict(stage.roles)
        self.heads = Heads(heads)
        self.trunk_layers, self.packing, self.autocast_dtype = trunk_layers, packing, autocast
        self.reward_head_trained = False
        self.value_range: tuple[float, float] | None = None
        self.trained_end: int | None = None
        self.template: str | None = None
        self.kept: dict[str, Any] = {}
        self.adapters = AdapterSwitch(base)
        has_trunk = trunk_layers > 0 and not stage.tunes_base
        self.trunk = Trunk(list(architecture.layers), trunk_layers) if has_trunk else None
        self._own_gradients()
        self.rope_limit = rope_limit(architecture.causal_lm)
        self._role: str | None = None
        self._thread: int | None = None  # that has the role in force
        self.packed_attention = packing_attention(architecture.config, self.device)
        self.checkpoint_offload = False
        self.enable_checkpointing(False)
        self.eval()

    # -- gradients and checkpointing ---------------------------------------------------------------------------------

    @property
    def train_stage(self) -> str:
        """Name of the stage."""
        return self.stage.name

    @property
    def trainable_roles(self) -> tuple[str, ...]:
        """Roles whose adapters receive gradients, by stage."""
        return self.stage.trained

    def _own_gradients(self) -> None:
        """Decide once which parameters receive gradients; no role switch changes it."""
        trainable = {id(p) for role in self.trainable_roles for p in self.role_parameters(role).values()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trainable)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return what training `role` changes: its adapter (or the whole base at stage `base`) and its scalar head."""
        spec = self._spec(role)
        if spec.adapter is not None:
            named = adapter_parameters(self.base, spec.adapter)
        else:
            named = dict(self.base.named_parameters()) if self.stage.tunes_base else {}
        named = {f"{role}.{name}": p for name, p in named.items()}
        if spec.head != "lm":
            read = [spec.head, *(["expected"] if spec.head == "reward" and self.expects else [])]
            named |= {f"{role}.{head}_head.{name}": p for head in read for name, p in self.heads[head].named_parameters()}
        return named

    def enable_checkpointing(self, enabled: bool = True, use_reentrant: bool = False, offload: bool | None = None) -> None:
        """Recompute activations in the backward pass, layer by layer, each in the role that its forward pass had.

        Without that, a layer would be recomputed under whatever adapter is active by then: wrong gradients, no error. Works
        in training and in evaluation mode; `recompute` says how.

        Args:
            offload: keep each layer's input in host memory until it is recomputed; None leaves that as it was set last, which
                at first is on the device.

        Raises:
            RoleError: for reentrant checkpointing, which cannot carry the role.
        """
        if use_reentrant:
            raise RoleError("use_reentrant=True cannot recompute a layer in its own role; use use_reentrant=False.")
        self.checkpoint_offload = self.checkpoint_offload if offload is None else offload
        enable_recompute(self.architecture.layers, self._recompute_contexts, enabled, self.checkpoint_offload)
        self.checkpointing = enabled

    def _recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._as_now()

    def _as_now(self) -> AbstractContextManager[None]:
        """Return what brings back the adapter and the attention in force at the moment of this call."""
        active, config = self.adapters.active, self.architecture.config
        attention = config._attn_implementation

        @contextmanager
        def again() -> Iterator[None]:
            with self.adapters.using(active), attention_of(config, attention):
                yield

        return again()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; both give the same numbers, and checkpointing works in both.

        The base stays in evaluation mode, whatever noise its config asks for: dropout, a router's jitter, another path through
        a layer. Quantised layers stay in training mode; `keep_quantised_layers_trainable` says why.
        """
        super().train(mode)
        self.base.eval()
        keep_quantised_layers_trainable(self)
        return self

    # -- roles -------------------------------------------------------------------------------------------------------

    @contextmanager
    def role(self, name: str) -> Iterator[Self]:
        """Be one role inside the block; blocks nest, and what was there before comes back, also after an exception.

        Moves and copies no weight.

        Raises:
            RoleError: when there is no such role, or another thread is in one.
        """
        spec = self._spec(name)
        thread = get_ident()
        with _ENTERING:
            if self._thread not in (None, thread):
                raise RoleError(
                    f"role={name!r} was asked for while another thread has the one base in role {self._role!r}; let one thread "
                    "use the model at a time."
                )
            before, owner = self._role, self._thread
            self._role, self._thread = name, thread
        try:
            with self.adapters.using(spec.adapter):
                yield self
        finally:
            self._role, self._thread = before, owner

    @property
    def current_role(self) -> str | None:
        """Name of the role in force; None outside of all roles."""
        return self._role

    def _spec(self, role: str) -> Role:
        if role not in self.roles:
            raise RoleError(
                f"role={role!r} does not exist at stage {self.train_stage!r}; choose among {', '.join(self.roles)}."
            )
        return self.roles[role]

    # -- passes ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.architecture.output_embeddings.weight.device

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model inside, adapters injected."""
        return self.architecture.causal_lm

    def hidden_states(
        self, input_ids: Tensor, trunk: Tensor | None = None, packing: Packing | None = None, **options: Any
    ) -> Tensor:
        """Run the base in the current role.

        Args:
            input_ids: (B, T), padded on the right only, so that causal attention needs no mask.
            trunk: (B, T, H) what leaves the trunk for these tokens, which is not run then.
            packing: runs the rows end to end, without their padding; only where `packs` says so.
            options: attention_mask, position_ids, past_key_values as the Hugging Face backbone takes them.

        Returns:
            (B, T, H) final hidden states, after the last norm; packed ones (1, N, H).
        """
        self.check_width(input_ids.shape[1])
        attention: AbstractContextManager[None] = nullcontext()
        if packing is not None:
            assert self.packed_attention is not None
            attention = attention_of(self.architecture.config, self.packed_attention)
            input_ids, options = packing.pack(input_ids), options | packing.options(self.packed_attention)
        # None leaves a caller's own autocast alone.
        precision = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype is not None else nullcontext()
        with precision, attention, nullcontext() if self.trunk is None else self.trunk.put(trunk, packing):
            return self.architecture.final_states(input_ids, **options)

    def check_width(self, width: int) -> None:
        """Refuse a batch so wide that a row's numbers would depend on the others.

        Raises:
            UnsupportedModelError: where the rotary embedding is that of the longest row, padding included.
        """
        if self.rope_limit is not None and width > self.rope_limit[0]:
            first, kind = self.rope_limit
            raise UnsupportedModelError(
                f"batch of width {width}: beyond {first} the model's rotary embedding ({kind}) is that of the longest row, so "
                "that a row's numbers depend on its neighbours; give shorter rows."
            )

    def logprobs(self, sequences: Sequences, temperature: float = 1.0, entropy_grad: bool = False) -> TokenLogprobs:
        """Compute log-probs and entropy of the response tokens in the current role, which must have the lm head.

        Returns:
            logprobs (B, R) and entropy (B, R), fp32 nats, of the distribution softmax(logits / temperature). Entries
            outside the response mask are finite and mean nothing.

        Raises:
            RoleError: outside of a role with the lm head.
        """
        self._require_head("lm")
        return self._logprobs(self._states(sequences), sequences, temperature, entropy_grad)

    def reference_and_reward(
        self, sequences: Sequences, temperature: float = 1.0, lm_rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute reference log-probs and scores, from one pass wherever the two roles share an adapter.

        Args:
            sequences: B rows.
            temperature: divides the logits.
            lm_rows: compute log-probs of only this many leading rows (joint SFT needs those of the chosen responses).

        Returns:
            ref_logprobs (lm_rows, R), nats, and scores (B,), both fp32; with gradients to what is trainable.

        Memory: one (B, T, H) hidden state and the chunks of `token_logprobs`.
        """
        return self._with_reference(sequences, temperature, lm_rows, lambda states: self._scores(states, sequences))

    def reference_and_members(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what `reference_and_reward` does, and from the same pass what each member says, (B, k)."""
        ref_logprobs, (scores, members, _) = self.reference_and_all(sequences, temperature)
        return ref_logprobs, scores, members

    def reference_and_all(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Compute reference log-probs, and from the same pass scores, what each member says, (B, k), and (B, H) fp32 states.

        The states are those that scores are read from, the final ones at the last response token.
        """

        def read(states: States) -> tuple[Tensor, Tensor, Tensor]:
            ends = states.at(sequences.last_positions()[:, None])[:, 0].float()
            return self._scores(states, sequences), self._members(states, sequences), ends

        return self._with_reference(sequences, temperature, None, read)

    def reference_and_readings(
        self, sequences: Sequences, lm_rows: int | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Readings]:
        """Compute reference log-probs as `reference_and_reward` does, and `readings`, from the same pass."""
        return self._with_reference(sequences, 1.0, lm_rows, lambda states: read_all(self.heads, states, sequences, columns))

    def _with_reference(
        self, sequences: Sequences, temperature: float, lm_rows: int | None, read: Callable[[States], Read]
    ) -> tuple[Tensor, Read]:
        """Return reference log-probs, and what `read` makes of the states of the reward role."""
        with self.role("reference"):
            states = self._states(sequences)
            ref_logprobs = self._logprobs(states, sequences.first(lm_rows), temperature, False).logprobs
        with self.role("reward"):
            if self.roles["reward"].adapter != self.roles["reference"].adapter:
                states = self._states(sequences)
            return ref_logprobs, read(states)

    @contextmanager
    def taking_trunk(self) -> Iterator[list[Tensor]]:
        """Collect what leaves the trunk in the passes of the block, (B, T, H) each; nothing where there is no trunk."""
        if self.trunk is None:
            yield []
        else:
            with self.trunk.take() as states:
                yield states

    @property
    def packs(self) -> bool:
        """Whether rows of different lengths are run end to end, so that no padding is computed."""
        return self.packing and self.packed_attention is not None

    def _states(self, sequences: Sequences) -> States:
        shape, lengths = sequences.input_ids.shape, sequences.lengths
        packing = None
        dtype = self.architecture.input_embeddings.weight.dtype
        if self.packs and lengths is not None and worth_packing(lengths, shape[1], dtype, self.device):
            packing = Packing(lengths, shape[1], sequences.input_ids.device)
        return States(self.hidden_states(sequences.input_ids, sequences.trunk, packing), packing)

    def _logprobs(self, states: States, sequences: Sequences, temperature: float, entropy_grad: bool) -> TokenLogprobs:
        hidden = states.at(sequences.state_positions())  # (B, R, H)
        return token_logprobs(
            hidden, sequences.response_ids, self.architecture.lm_head(), temperature=temperature, entropy_grad=entropy_grad
        )
