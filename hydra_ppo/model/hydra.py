"""HydraModel: one base in memory that is actor, reference, critic and reward model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from peft import LoraConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.compat import mend_int8_layers
from hydra_ppo.compute.gated_mlp import use_lean_mlps
from hydra_ppo.compute.lora import use_lean_linear, use_lean_lora
from hydra_ppo.compute.recompute import disable_native_checkpointing
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.adapter_options import adapter_folder, unused_settings
from hydra_ppo.model.adapters import (
    check_trunk_is_free,
    copy_adapter,
    lora_config,
    put_adapter,
    refuse_adapters,
)
from hydra_ppo.model.architecture import disable_dropout, inspect_architecture, keep_quantised_layers_trainable, understand_head
from hydra_ppo.model.heads import HeadPlan, scalar_heads, settled_plan
from hydra_ppo.model.loading import DTYPES, base_from_config, load_base, quantization_of
from hydra_ppo.model.manifest import MANIFEST, base_folder, check_base, held_otherwise, read_manifest
from hydra_ppo.model.probe import as_one_line, probe, without_values
from hydra_ppo.model.quantized_embeddings import embeddings_kind
from hydra_ppo.model.ranks import check_rank, own_ranks, sized
from hydra_ppo.model.role_model import RoleModel
from hydra_ppo.model.roles import Stage, StageName, build_stage
from hydra_ppo.model.saving import read_heads, write_model
from hydra_ppo.model.sharding import check_shardable, is_sharded
from hydra_ppo.model.tiling import tile

logger = logging.getLogger("hydra_ppo")

FROM_ADAPTER: dict[str, dict[str, str]] = {"reference": {"adapter": "sft"}, "reward": {"adapter": "sft"}}
"""Roles of a base with an adapter from elsewhere: one pass is reference and reward model, as after joint SFT here."""

CheckName = Literal["fast", "full", "off"]


class HydraModel(RoleModel):
    """A shared base with a causal head, scalar heads and LoRA adapters.

    `with model.role("critic"):` makes the base that role; outside of any role the adapters are off. The roles are

    | role | adapter | head |
    |---|---|---|
    | actor | `actor` | lm |
    | critic | `critic` | value |
    | reference | what joint SFT left: `sft` or none | lm |
    | reward | what reward training left, or the same | reward |

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
        adapter: folder of a LoRA adapter that PEFT wrote, which becomes the `sft` adapter: the reference, and what actor and
            critic start from.
        autocast: compute type of a base that is itself trained, whose weights stay in fp32.
        check: try the passes of the model on a few tokens, `fast`, on rows of some hundred, `full`, or not, `off`.
        tile_tokens: run gated MLPs, norms and the pass over prompts over pieces of this many tokens; None is all at once.
        heads: which scalar heads there are; None is those of the saved model, or a value and a reward head.

    Memory: the base once; per adapter set 4 bytes a LoRA parameter; per head H numbers, k times as many of k reward heads.

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
        adapter: Path | None = None,
        autocast: torch.dtype | None = None,
        check: CheckName = "fast",
        tile_tokens: int | None = None,
        heads: HeadPlan | None = None,
    ) -> None:
        if check not in get_args(CheckName):
            raise ConfigError(f"model.check={check!r} is unknown; choose fast, full or off.")
        refuse_adapters(causal_lm)
        architecture = inspect_architecture(causal_lm)
        manifest = read_manifest(saved) if saved is not None else None
        if adapter is not None and manifest is not None:
            raise ConfigError(
                f"model.adapter={str(adapter)!r} does not go with a run of this program, which brings its own; name the plain "
                "base."
            )
        plan = settled_plan(heads, manifest)
        roles = manifest["roles"] if manifest else FROM_ADAPTER if adapter is not None else {}
        stage = train if isinstance(train, Stage) else build_stage(train, roles)
        trunk_layers = _trunk_layers(trunk_layers, manifest, len(architecture.layers))
        disable_dropout(causal_lm)
        keep_quantised_layers_trainable(causal_lm)
        mend_int8_layers(causal_lm)
        disable_native_checkpointing(causal_lm)  # it may be reentrant, and knows no role
        if not without_values(architecture.output_embeddings.weight):  # not a matter of `check`: scales would be left out
            with as_one_line(causal_lm):
                architecture = understand_head(architecture)
        folders = {name: saved / name for name in stage.adapters} if saved is not None else {"sft": adapter} if adapter else {}
        base = _with_adapters(causal_lm, stage, lora_config(architecture, lora, trunk_layers), folders, own_ranks(lora))
        for name in (name for name in folders if isinstance(base, PeftModel) and name in base.peft_config):
            unused = unused_settings(lora, cast(LoraConfig, base.peft_config[name]), name)
            if unused is not None and (folders[name] / "adapter_config.json").is_file():
                logger.warning(unused)
                break
        if adapter is not None:
            check_trunk_is_free(architecture.layers, trunk_layers)
        use_lean_lora(base)
        use_lean_mlps(architecture.layers)
        use_lean_linear(architecture.layers)
        if tile_tokens is not None:
            tile(architecture, tile_tokens, stage.tunes_base)
        scalars = scalar_heads(architecture.hidden_size, architecture.output_embeddings.weight.device, plan)
        if saved is not None and manifest is not None:
            read_heads(scalars, saved, manifest)
            computed_in = str(causal_lm.dtype).removeprefix("torch.")
            if (
                note := held_otherwise(manifest, quantization_of(causal_lm), computed_in, embeddings_kind(causal_lm))
            ) is not None:
                logger.warning("%s: %s", saved, note)
        super().__init__(architecture, base, stage, scalars, trunk_layers=trunk_layers, packing=packing, autocast=autocast)
        self.reward_head_trained = bool(manifest and manifest["reward_head_trained"])
        self.template = manifest.get("template") if manifest else None
        self.bound_values(manifest.get("value_range") if manifest else None)
        if manifest and manifest.get("end_ids"):
            self.trained_end = manifest["end_ids"][0]
            causal_lm.generation_config.eos_token_id = manifest["end_ids"]
        self.check, self.tile_tokens = check, tile_tokens
        self.is_sharded = any(is_sharded(layer) for layer in architecture.layers)
        if check != "off" and not without_values(architecture.output_embeddings.weight):
            probe(self, check, quantised=quantization_of(causal_lm) == "int8")

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
        check: CheckName = "fast",
        adapter: str | os.PathLike[str] | None = None,
        quantize_embeddings: Literal["int8", "nf4"] | None = None,
        tile_tokens: int | None = None,
        shard: bool = False,
        heads: HeadPlan | None = None,
    ) -> Self:
        """Load a causal LM (folder or hub name), or a folder that `save_pretrained` wrote.

        Args:
            name_or_path: model name, model folder, or saved HydraModel.
            quantization: how linear layers of the base are held; None keeps them.
            lora: shape of new adapters; of a saved model, its own shape counts.
            attention: auto, flash_attention_2, sdpa or eager.
            dtype: auto, fp32, bf16 or fp16.
            trunk_layers: adapters sit on the layers above this many.
            packing: see the class.
            device: auto, cpu, cuda or cuda:N.
            trust_remote_code: run Python code that comes with the model. Never on by itself.
            train, check, adapter, tile_tokens, heads: see the class.
            quantize_embeddings: how embeddings and output head are held; None keeps them in the compute type.
            shard: share the decoder layers out over the processes of torch.distributed, see `sharding`.

        Raises:
            ConfigError, UnsupportedModelError: one line that says what to do.
        """
        tunes_base = train == "base" or (isinstance(train, Stage) and train.tunes_base)
        if tunes_base and quantization is not None:
            raise ConfigError(f"model.quantization={quantization!r} leaves no weights that train='base' can train; use None.")
        if tunes_base and quantize_embeddings is not None:
            raise ConfigError(f"model.quantize_embeddings={quantize_embeddings!r} cannot be trained by train='base'; use None.")
        if shard:
            check_shardable(quantization, tunes_base)
        brought = None if adapter is None else adapter_folder(adapter)
        path = Path(name_or_path).expanduser()
        name_or_path = str(path) if path.is_dir() else name_or_path
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
            quantized_embeddings=quantize_embeddings,
            shard=shard,
        )
        autocast = DTYPES.get(dtype) if tunes_base and dtype != "fp32" else None
        options: dict[str, Any] = {"trunk_layers": trunk_layers, "packing": packing, "check": check}
        return cls(
            causal_lm,
            lora=lora,
            train=train,
            saved=saved,
            adapter=brought,
            autocast=autocast,
            tile_tokens=tile_tokens,
            heads=heads,
            **options,
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
        check: CheckName = "fast",
        quantize_embeddings: Literal["int8", "nf4"] | None = None,
        tile_tokens: int | None = None,
        shard: bool = False,
        heads: HeadPlan | None = None,
    ) -> Self:
        """Build a model with random weights from a Hugging Face config; arguments as in `from_pretrained`."""
        if shard:
            check_shardable(quantization, train == "base" or (isinstance(train, Stage) and train.tunes_base))
        causal_lm = base_from_config(
            config,
            quantization=quantization,
            attention=attention,
            dtype=dtype,
            device=device,
            quantized_embeddings=quantize_embeddings,
            shard=shard,
        )
        options: dict[str, Any] = {"trunk_layers": trunk_layers, "packing": packing, "check": check}
        return cls(causal_lm, lora=lora, train=train, tile_tokens=tile_tokens, heads=heads, **options)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write adapters as PEFT folders, heads as safetensors, and `hydra.json`, which says which role uses what.

        The base is written (to `base/`) only where it was itself trained. `PeftModel.from_pretrained(base, folder/actor)`
        loads an adapter without this package.
        """
        write_model(self, Path(folder).expanduser())


def _trunk_layers(asked: int, manifest: Mapping[str, Any] | None, depth: int) -> int:
    """Return the layers below all adapters: as asked, or as the saved adapters were trained."""
    found = asked
    if manifest and manifest["adapters"]:  # adapters bring their trunk with them; a tuned base alone does not
        found = manifest["trunk_layers"]
        if asked not in (0, found):
            raise ConfigError(
                f"model.trunk_layers={asked} differs from the {found} that the saved adapters were "
                f"trained with; use {found}, or start again from the base."
            )
    if not 0 <= found < depth:
        raise ConfigError(
            f"model.trunk_layers={found} must be at least 0 and below the {depth} decoder layers of the model; choose fewer."
        )
    return found


def _with_adapters(
    causal_lm: PreTrainedModel, stage: Stage, shape: LoraConfig, folders: Mapping[str, Path], ranks: Mapping[str, int]
) -> PreTrainedModel | PeftModel:
    """Put the adapters of all roles on the base: those of `folders` as they were, new ones as exact copies of one of them.

    Actor and critic start as reference and reward; a reward adapter of its own starts as the reference. `ranks` says which
    have a rank of their own.
    """
    base: PreTrainedModel | PeftModel = causal_lm
    for name in stage.adapters:
        folder = folders[name] if name in folders and (folders[name] / "adapter_config.json").is_file() else None
        source = stage.starts.get(name)
        like = shape if source is None else cast(LoraConfig, base.peft_config[source])  # put there by this loop
        base = put_adapter(base, name, sized(like, ranks.get(name), source), folder)
        if folder is None and source is not None:
            copy_adapter(base, source, name)
        check_rank(base, name, ranks.get(name))
    return base
