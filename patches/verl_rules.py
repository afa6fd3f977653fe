"""verl's settings as its engine `hydra` meets them: what is refused, and what the rest says of the one base.

Nothing of verl, and no torch, is imported with this module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from hydra_ppo.patches.versions import HostError

PLACES = {
    "actor": {"model": "actor_rollout_ref.model", "engine": "actor_rollout_ref.actor.fsdp_config"},
    "reference": {"model": "actor_rollout_ref.model", "engine": "actor_rollout_ref.ref.fsdp_config"},
    "critic": {"model": "critic.model", "engine": "critic.fsdp"},
}
"""Where a role's groups of settings stand on verl's command line."""

CHECKPOINTS = {
    "actor": "actor_rollout_ref.actor.checkpoint",
    "reference": "actor_rollout_ref.ref.checkpoint",
    "critic": "critic.checkpoint",
}

OFF: tuple[Any, ...] = (None, False, 0, "", [], {}, ())

REPLACED = "replaces layers that the adapters stand on"
BLOCKS = "is another way to what this engine always does, log-probs without whole logits"
WHOLE = "but each process holds the whole base, which all roles share"
ONE_SHAPE = "is no shape that adapters of a shared base can have"
LEAVE_OUT = "leave it out"


class Rule(NamedTuple):
    """A setting that works with some values only."""

    group: str
    setting: str
    allowed: Collection[Any]
    why: str
    remedy: str


RULES = (
    Rule("model", "exclude_modules", OFF, ONE_SHAPE, "name the layers that have adapters in target_modules"),
    Rule("model", "use_liger", OFF, REPLACED, LEAVE_OUT),
    Rule("model", "use_fused_kernels", OFF, BLOCKS, LEAVE_OUT),
    Rule("model", "tiled_mlp.enabled", OFF, REPLACED, "use model.lora.hydra.tile_tokens"),
    Rule("model", "mtp.enable", OFF, "has layers that no role runs", LEAVE_OUT),
    Rule("model", "lora.merge", OFF, "would write an adapter into the base of all roles", "use false: verl sends the adapter"),
    Rule("model", "lora.rank", OFF, "is read by Megatron's engine", "set model.lora_rank"),
    Rule("model", "lora.adapter_path", OFF, "is read by Megatron's engine", "set model.lora_adapter_path"),
    Rule("engine", "param_offload", OFF, "but the base stays on the device, for every role runs on it", "use false"),
    Rule("engine", "offload_policy", OFF, "but the base stays on the device, for every role runs on it", "use false"),
    Rule("engine", "ulysses_sequence_parallel_size", (1,), "but a row is computed by one process", "use 1"),
    Rule("engine", "fsdp_size", (-1, 1), WHOLE, LEAVE_OUT),
    Rule("engine", "pad_to_length", OFF, "pads what packed rows do without", LEAVE_OUT),
    Rule("engine", "qat.enable", OFF, "trains weights of the base, which must stay as it is", LEAVE_OUT),
    Rule("engine", "router_replay.mode", ("disabled",), "is not known to the shared base", "use disabled"),
)

SAVED = ("model", "optimizer", "extra")
"""What a checkpoint of verl may hold here."""


@dataclass(frozen=True)
class Extra:
    """What verl has no setting for: `+actor_rollout_ref.model.lora.hydra.quantization=nf4`.

    Attributes:
        quantization: int8, nf4 or fp4; how linear layers of the base are held.
        quantize_embeddings: int8 or nf4; how embeddings and output head are held.
        trunk_layers: adapters sit on the layers above this many.
        tile_tokens: MLPs and norms run over pieces of this many tokens.
    """

    quantization: str | None = None
    quantize_embeddings: str | None = None
    trunk_layers: int = 0
    tile_tokens: int | None = None


ALLOWED = {"quantization": (None, "int8", "nf4", "fp4"), "quantize_embeddings": (None, "int8", "nf4")}
TYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
ATTENTION = ("auto", "flash_attention_2", "sdpa", "eager")


class Settings(NamedTuple):
    """What verl's settings say of the base and its adapters.

    Attributes:
        path: folder of the base.
        adapter: folder that training starts from, of PEFT or of hydra-ppo; None starts from the plain base.
        rank, alpha, target_modules, target_parameters: shape of the adapters.
        dtype: compute type of the base; bf16, fp16 or fp32.
        attention: kernel, auto where nobody said.
        packing: whether rows are run end to end.
        checkpointing, checkpoint_offload: whether layers are recomputed, and their inputs kept in host memory.
        trust_remote_code: whether to run code that comes with the model.
        extra: what verl has no setting for.
    """

    path: str
    adapter: str | None
    rank: int
    alpha: int
    target_modules: Any
    target_parameters: tuple[str, ...]
    dtype: str
    attention: str
    packing: bool
    checkpointing: bool
    checkpoint_offload: bool
    trust_remote_code: bool
    extra: Extra


def refuse(role: str, model: Any, engine: Any, checkpoint: Any) -> None:
    """Check verl's settings of one engine, before anything is loaded.

    Args:
        role: actor, reference or critic.
        model, engine, checkpoint: HFModelConfig, FSDPEngineConfig and CheckpointConfig, or what has their attributes; absent
            ones are allowed.

    Raises:
        HostError: for the first that does not go together with a shared base.
    """
    groups = {"model": model, "engine": engine}
    for rule in RULES:
        value = found(groups[rule.group], rule.setting)
        if value is not MISSING and value not in rule.allowed:
            raise HostError(f"{PLACES[role][rule.group]}.{rule.setting}={value!r} {rule.why}; {rule.remedy}.")
    place = PLACES[role]["model"]
    if role != "critic" and not found(model, "lora_rank", 0):
        raise HostError(
            f"{place}.lora_rank=0 would train the base itself, which all roles share; set the rank of the adapters, 16 say."
        )
    if role == "critic" and found(model, "lora_adapter_path", None):
        raise HostError(
            f"{place}.lora_adapter_path={model.lora_adapter_path!r}, but the critic starts from what "
            "actor_rollout_ref.model.lora_adapter_path names; leave it out."
        )
    config_path = found(model, "hf_config_path", None)
    if config_path not in (None, found(model, "path", None)):
        raise HostError(f"{place}.hf_config_path={config_path!r} is another model's; leave it out.")
    strangers = sorted(set(found(model, "override_config", {}) or {}) - {"attn_implementation"})
    if strangers:
        raise HostError(
            f"{place}.override_config.{strangers[0]} would change the base behind the adapters; write it into the folder's "
            "config.json."
        )
    for name in ("save_contents", "load_contents"):
        if wrong := [part for part in found(checkpoint, name, None) or () if part not in SAVED]:
            raise HostError(
                f"{CHECKPOINTS[role]}.{name} has {wrong[0]!r}, but adapters are what is trained; keep {', '.join(SAVED)}, and "
                "write whole models by hydra-ppo export."
            )
    if found(checkpoint, "async_save", False):
        raise HostError(f"{CHECKPOINTS[role]}.async_save=True, but adapters are small and written at once; use false.")


MISSING = object()


def found(group: Any, setting: str, default: Any = MISSING) -> Any:
    """Return a setting of a group, `a.b` for one inside another; `default` where there is no such."""
    for name in setting.split("."):
        group = group.get(name, MISSING) if isinstance(group, Mapping) else getattr(group, name, MISSING)
        if group is MISSING:
            return default
    return group


def read(role: str, model: Any, engine: Any) -> Settings:
    """Return what verl's settings say of the base, once `refuse` let them through.

    Raises:
        HostError: for values that nothing here can be made of.
    """
    place = PLACES[role]["model"]
    mixed = found(engine, "mixed_precision", None) or {}
    asked = str(mixed.get("param_dtype", "bf16"))
    if asked not in TYPES:
        raise HostError(f"{PLACES[role]['engine']}.mixed_precision.param_dtype={asked!r} is no compute type; use bf16 or fp16.")
    attention = (found(model, "override_config", {}) or {}).get("attn_implementation", "auto")
    if attention not in ATTENTION:
        raise HostError(
            f"{place}.override_config.attn_implementation={attention!r} is unknown; use one of {', '.join(ATTENTION)}."
        )
    checkpointing, offload = bool(model.enable_gradient_checkpointing), bool(model.enable_activation_offload)
    if offload and not checkpointing:
        raise HostError(
            f"{place}.enable_activation_offload=True moves what gradient checkpointing keeps, and "
            "enable_gradient_checkpointing=False keeps nothing of it; set the latter to True."
        )
    targets = model.target_modules
    return Settings(
        path=str(model.local_path or model.path),
        adapter=found(model, "lora_adapter_path", None) or None,
        rank=int(model.lora_rank),
        alpha=int(model.lora_alpha),
        target_modules=targets if isinstance(targets, str | None) else list(targets),
        target_parameters=tuple(found(model, "target_parameters", None) or ()),
        dtype=TYPES[asked],
        attention=attention,
        packing=bool(model.use_remove_padding),
        checkpointing=checkpointing,
        checkpoint_offload=offload,
        trust_remote_code=bool(model.trust_remote_code),
        extra=_extra(place, (found(model, "lora", {}) or {}).get("hydra") or {}),
    )


def _extra(place: str, given: Mapping[str, Any]) -> Extra:
    known = [field.name for field in fields(Extra)]
    for name, value in given.items():
        if name not in known:
            raise HostError(f"{place}.lora.hydra.{name} is not a setting; choose among {', '.join(known)}.")
        if name in ALLOWED and value not in ALLOWED[name]:
            choices = ", ".join(str(choice) for choice in ALLOWED[name] if choice)
            raise HostError(f"{place}.lora.hydra.{name}={value!r} is unknown; choose {choices}, or leave it out.")
    return Extra(**given)


def check_shared(role: str, own: Settings, base: Settings) -> None:
    """Refuse a reference or critic whose settings ask for another base than the actor's.

    Raises:
        HostError: naming both values.
    """
    actor, place = PLACES["actor"], PLACES[role]
    pairs = [("model", "path", own.path, base.path)]
    pairs.append(("model", "use_remove_padding", own.packing, base.packing))
    pairs.append(("model", "enable_gradient_checkpointing", own.checkpointing, base.checkpointing))
    pairs.append(("model", "enable_activation_offload", own.checkpoint_offload, base.checkpoint_offload))
    pairs.append(("engine", "mixed_precision.param_dtype", own.dtype, base.dtype))
    if own.rank:
        pairs.append(("model", "lora_rank", own.rank, base.rank))
        pairs.append(("model", "lora_alpha", own.alpha, base.alpha))
        pairs.append(("model", "target_modules", own.target_modules, base.target_modules))
    if own.extra != Extra():
        pairs.append(("model", "lora.hydra", own.extra, base.extra))
    for group, setting, ours, theirs in pairs:
        if ours != theirs:
            raise HostError(
                f"{place[group]}.{setting}={ours!r} is not {theirs!r}, which {actor[group]}.{setting} says of the one base of "
                "all roles; set both alike."
            )
