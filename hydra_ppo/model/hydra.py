"""HydraModel: one base in memory that is actor, reference, critic and reward model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.compat import last_hidden_state, mend_int8_layers
from hydra_ppo.compute.gated_mlp import use_lean_mlps
from hydra_ppo.compute.logprobs import TokenLogprobs, token_logprobs
from hydra_ppo.compute.lora import use_lean_linear, use_lean_lora
from hydra_ppo.compute.packing import Packing, States, attention_of, packing_attention
from hydra_ppo.compute.recompute import disable_native_checkpointing, enable_recompute
from hydra_ppo.compute.trunk import Trunk
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError, RoleError
from hydra_ppo.experience import Sequences
from hydra_ppo.model.adapters import AdapterSwitch, adapter_parameters, copy_adapter, lora_config, put_adapter
from hydra_ppo.model.architecture import check_head, disable_dropout, inspect_architecture, keep_quantised_layers_trainable
from hydra_ppo.model.loading import DTYPES, base_from_config, load_base
from hydra_ppo.model.manifest import MANIFEST, base_folder, check_base, read_manifest
from hydra_ppo.model.roles import Role, Stage, StageName, build_stage
from hydra_ppo.model.saving import read_heads, write_model
from hydra_ppo.views.views import Views


class HydraModel(nn.Module):
    """A shared base with a causal head, scalar heads and LoRA adapters.

    `with model.role("critic"):` makes the base that role; outside of any role the adapters are off. The roles are

    ========= ======================================== ======
    role      adapter                                  head
    ========= ======================================== ======
    actor     `actor`                                  lm
    critic    `critic`                                 value
    reference what joint SFT left: `sft` or none       lm
    reward    what reward training left, or the same   reward
    ========= ======================================== ======

    Actor and critic start as exact copies of reference and reward: the same numbers, to the last bit, from the same pass.

    Args:
        causal_lm: the base, in memory; it is modified in place (adapters are injected, dropout goes to 0).
        lora: shape of new adapters.
        train: what is trainable: `ppo` actor and critic, `sft` or `reward` the adapter of that name, `base` the base
            itself; or a role table of its own.
        trunk_layers: adapters sit on the decoder layers above this many.
        packing: run rows of different lengths end to end, so that no padding is computed, where the attention can do it:
            flash-attention on a GPU, any on a CPU, for the model types in `packing.FAMILIES`.
        saved: folder that `save_pretrained` wrote, whose adapters and heads are taken over.
        autocast: compute type of a base that is itself trained, whose weights stay in fp32.

    Memory: the base once; per adapter set 4 bytes a LoRA parameter; two heads of H numbers.

    Raises:
        UnsupportedModelError: naming what the architecture lacks.
        ConfigError: when settings contradict the model.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        lora: LoraConfig | LoraSettings | None = None,
        train: StageName | Stage = "ppo",
        trunk_layers: int = 0,
        packing: bool = True,
        saved: Path | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast_dtype = autocast
        self.architecture = inspect_architecture(causal_lm)
        manifest = read_manifest(saved) if saved is not None else None
        self.stage = train if isinstance(train, Stage) else build_stage(train, manifest["roles"] if manifest else {})
        self.trunk_layers = trunk_layers
        if manifest and manifest["adapters"]:  # adapters bring their trunk with them; a tuned base alone does not
            self.trunk_layers = manifest["trunk_layers"]
            if trunk_layers not in (0, self.trunk_layers):
                raise ConfigError(
                    f"model.trunk_layers={trunk_layers} differs from the {self.trunk_layers} that the saved adapters were "
                    f"trained with; use {self.trunk_layers}, or start again from the base."
                )
        depth = len(self.architecture.layers)
        if not 0 <= self.trunk_layers < depth:
            raise ConfigError(
                f"model.trunk_layers={self.trunk_layers} must be at least 0 and below the {depth} decoder layers of the model; "
                "choose fewer."
            )
        disable_dropout(causal_lm)
        keep_quantised_layers_trainable(causal_lm)
        mend_int8_layers(causal_lm)
        disable_native_checkpointing(causal_lm)  # it may be reentrant, and knows no role
        check_head(self.architecture)

        self.base: PreTrainedModel | PeftModel = causal_lm
        self.reward_head_trained = bool(manifest and manifest["reward_head_trained"])
        self.roles = dict(self.stage.roles)
        self._put_adapters(lora_config(self.architecture, lora, self.trunk_layers), saved)
        use_lean_lora(self.base)
        use_lean_mlps(self.architecture.layers)
        use_lean_linear(self.architecture.layers)
        self.adapters = AdapterSwitch(self.base)
        has_trunk = self.trunk_layers > 0 and not self.stage.tunes_base
        self.trunk = Trunk(self.architecture.layers, self.trunk_layers) if has_trunk else None

        weight = self.architecture.output_embeddings.weight
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(self.architecture.hidden_size, 1, bias=False, device=weight.device)
                for name in ("value", "reward")
            }
        )
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
        if saved is not None:
            read_heads(self.heads, saved, manifest)
        self._own_gradients()
        self._role: str | None = None
        self._views: tuple[Views] | None = None
        self.packing = packing
        self.packed_attention = packing_attention(self.architecture.config, self.device)
        self.enable_checkpointing(False)
        self.eval()

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        quantization: Literal["int8", "nf4", "fp4"] | None = None,
        lora: LoraConfig | LoraSettings | None = None,
        attention: str = "auto",
        dtype: str = "auto",
        trunk_layers: int = 0,
        packing: bool = True,
        device: str = "auto",
        trust_remote_code: bool = False,
        train: StageName | Stage = "ppo",
    ) -> Self:
        """Load a causal LM (folder or hub name), or a folder that `save_pretrained` wrote.

        Args:
            name_or_path: model name, model folder, or saved HydraModel.
            quantization: how linear layers of the base are held; None keeps them.
            lora: shape of new adapters; of a saved model, its own shape counts.
            attention: auto, sdpa or flash_attention_2.
            dtype: auto, fp32, bf16 or fp16.
            trunk_layers: adapters sit on the layers above this many.
            packing: see the class.
            device: auto, cpu, cuda or cuda:N.
            trust_remote_code: run Python code that comes with the model. Never on by itself.
            train: see the class.

        Raises:
            ConfigError, UnsupportedModelError: one line that says what to do.
        """
        tunes_base = train == "base" or (isinstance(train, Stage) and train.tunes_base)
        if tunes_base and quantization is not None:
            raise ConfigError(f"model.quantization={quantization!r} leaves no weights that train='base' can train; use None.")
        path = Path(name_or_path)
        saved = path if (path / MANIFEST).is_file() else None
        base = base_folder(path) if saved is not None else str(name_or_path)
        if saved is not None:
            check_base(saved, base)
        causal_lm = load_base(
            base,
            quantization=quantization,
            attention=attention,
            dtype="fp32" if tunes_base else dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        autocast = DTYPES.get(dtype) if tunes_base and dtype != "fp32" else None
        return cls(
            causal_lm, lora=lora, train=train, trunk_layers=trunk_layers, packing=packing, saved=saved, autocast=autocast
        )

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        *,
        quantization: Literal["int8", "nf4", "fp4"] | None = None,
        lora: LoraConfig | LoraSettings | None = None,
        attention: str = "auto",
        dtype: str = "auto",
        trunk_layers: int = 0,
        packing: bool = True,
        device: str = "auto",
        train: StageName | Stage = "ppo",
    ) -> Self:
        """Build a model with random weights from a Hugging Face config; arguments as in `from_pretrained`."""
        causal_lm = base_from_config(config, quantization=quantization, attention=attention, dtype=dtype, device=device)
        return cls(causal_lm, lora=lora, train=train, trunk_layers=trunk_layers, packing=packing)

    def _put_adapters(self, shape: LoraConfig, saved: Path | None) -> None:
        """Put the adapters of all roles on the base: saved ones as they were, new ones as exact copies of a saved one.

        Actor and critic start as reference and reward; a reward adapter of its own starts as the reference.
        """
        for name in self.stage.adapters:
            folder = saved / name if saved is not None and (saved / name / "adapter_config.json").is_file() else None
            source = self.stage.starts.get(name)
            like = self.base.peft_config[source] if source is not None else shape
            self.base = put_adapter(self.base, name, like, folder)
            if folder is None and source is not None:
                copy_adapter(self.base, source, name)

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
            named |= {f"{role}.{spec.head}_head.{name}": p for name, p in self.heads[spec.head].named_parameters()}
        return named

    def enable_checkpointing(self, enabled: bool = True, use_reentrant: bool = False) -> None:
        """Recompute activations in the backward pass, layer by layer, each in the role that its forward pass had.

        Without that, a layer would be recomputed under whatever adapter is active by then: wrong gradients, no error. Works
        in training and in evaluation mode; `recompute` says how.

        Raises:
            RoleError: for reentrant checkpointing, which cannot carry the role.
        """
        if use_reentrant:
            raise RoleError("use_reentrant=True cannot recompute a layer in its own role; use use_reentrant=False.")
        enable_recompute(self.architecture.layers, self._recompute_contexts, enabled)
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

        Dropout is off in both. Quantised layers stay in training mode; `keep_quantised_layers_trainable` says why.
        """
        super().train(mode)
        keep_quantised_layers_trainable(self)
        return self

    # -- roles -------------------------------------------------------------------------------------------------------

    @contextmanager
    def role(self, name: str) -> Iterator[Self]:
        """Be one role inside the block; blocks nest, and what was there before comes back, also after an exception.

        Moves and copies no weight.

        Raises:
            RoleError: when there is no such role.
        """
        spec = self._spec(name)
        before = self._role
        self._role = name
        try:
            with self.adapters.using(spec.adapter):
                yield self
        finally:
            self._role = before

    def views(self) -> Views:
        """Return the roles as Hugging Face models, for code that expects four; the same objects each time."""
        if self._views is None:
            self._views = (Views(self),)  # in a tuple: views are no submodules of the model behind them
        return self._views[0]

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
        attention: AbstractContextManager[None] = nullcontext()
        if packing is not None:
            assert self.packed_attention is not None
            attention = attention_of(self.architecture.config, self.packed_attention)
            input_ids, options = packing.pack(input_ids), options | packing.options()
        # None leaves a caller's own autocast alone.
        cast = torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype is not None else nullcontext()
        with cast, attention, nullcontext() if self.trunk is None else self.trunk.put(trunk, packing):
            return last_hidden_state(self.architecture.backbone, input_ids, **options)

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

    def values(self, sequences: Sequences) -> Tensor:
        """Return (B, R) values of the state before each response token, in the current role (critic or reward)."""
        self._require_head("value", "reward")
        return self._scalar(self._states(sequences).at(sequences.state_positions()))

    def scores(self, sequences: Sequences) -> Tensor:
        """Return (B,) what the current role's scalar head says at the last response token."""
        self._require_head("value", "reward")
        return self._scalar(self._states(sequences).at(sequences.last_positions()[:, None]))[:, 0]

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
        with self.role("reference"):
            states = self._states(sequences)
            ref_logprobs = self._logprobs(states, sequences.first(lm_rows), temperature, False).logprobs
        with self.role("reward"):
            if self.roles["reward"].adapter != self.roles["reference"].adapter:
                return ref_logprobs, self.scores(sequences)
            return ref_logprobs, self._scalar(states.at(sequences.last_positions()[:, None]))[:, 0]

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
        if self.packs and lengths is not None and sum(lengths) < shape.numel():
            packing = Packing(lengths, shape[1], sequences.input_ids.device)
        return States(self.hidden_states(sequences.input_ids, sequences.trunk, packing), packing)

    def _logprobs(self, states: States, sequences: Sequences, temperature: float, entropy_grad: bool) -> TokenLogprobs:
        hidden = states.at(sequences.state_positions())  # (B, R, H)
        return token_logprobs(
            hidden, sequences.response_ids, self.architecture.lm_head(), temperature=temperature, entropy_grad=entropy_grad
        )

    def _scalar(self, hidden: Tensor) -> Tensor:
        assert self._role is not None
        return self.heads[self.roles[self._role].head](hidden.float())[..., 0]

    def _require_head(self, *heads: str) -> None:
        head = self.roles[self._role].head if self._role is not None else None
        if head not in heads:
            raise RoleError(
                f"role={self._role!r} has no {' or '.join(heads)} head; call this inside `with model.role(...)` of one "
                "that has."
            )

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write adapters as PEFT folders, heads as safetensors, and `hydra.json`, which says which role uses what.

        The base is written (to `base/`) only where it was itself trained. `PeftModel.from_pretrained(base, folder/actor)`
        loads an adapter without this package.
        """
        write_model(self, Path(folder))
