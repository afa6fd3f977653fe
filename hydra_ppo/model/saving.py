"""Writes a HydraModel as PEFT folders, heads and a manifest, and reads the heads back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.adapters import read_adapter
from hydra_ppo.model.fingerprint import weights_digest
from hydra_ppo.model.for_others import save_for_others
from hydra_ppo.model.heads import mean_weight
from hydra_ppo.model.loading import quantization_of
from hydra_ppo.model.manifest import FORMAT, MANIFEST, WITH_HEADS, describe_base, findable, read_manifest
from hydra_ppo.model.quantized_embeddings import embeddings_kind
from hydra_ppo.model.role_model import RoleModel
from hydra_ppo.runtime.files import PARTIAL, write_whole

HEADS = "heads.safetensors"


def write_model(model: RoleModel, folder: Path) -> None:
    """Write adapters, heads, `hydra.json`, and the base to `base/` where it was itself trained.

    `hydra.json` names a local base relative to the folder, so that both can be moved together; the adapters' own configs name
    it absolutely, for PEFT looks from wherever its caller stands. It goes first and comes last: a folder that has one is whole,
    whenever the process died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = _describe_base(model, folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    adapters = sorted(model.stage.adapters)
    for name in adapters:
        write_adapter(model, name, folder / name, adapter_tensors(model, name))
    used: list[str] = sorted({role.head for role in model.roles.values()} - {"lm"})
    if model.expects and "reward" in used:
        used = sorted([*used, "expected"])
    heads = {f"{n}.{k}": v for n in used for k, v in model.heads[n].state_dict().items()}
    _write_tensors(heads, folder / HEADS)
    if model.stage.tunes_base:
        save_for_others(model.causal_lm, folder / "base")
    manifest = {
        "format": WITH_HEADS if "expected" in used or model.reward_heads > 1 else FORMAT,
        "base": base,
        "roles": {name: asdict(role) for name, role in model.roles.items()},
        "adapters": adapters,
        "heads": used,
        "reward_heads": model.reward_heads,
        "reward_head_trained": model.reward_head_trained,
        "trunk_layers": model.trunk_layers,
        "end_ids": _end_ids(model),
        "quantization": quantization_of(model.causal_lm),
        "embeddings": embeddings_kind(model.causal_lm),
        "dtype": str(model.causal_lm.dtype).removeprefix("torch."),
        "template": model.template,
        "value_range": model.value_range,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _describe_base(model: RoleModel, folder: Path) -> dict[str, Any]:
    if model.stage.tunes_base:
        return {"name_or_path": "base", "relative": True}
    name = str(model.causal_lm.name_or_path)
    digest = weights_digest(name)
    return describe_base(name, folder) | ({} if digest is None else {"weights": digest})


def adapter_tensors(model: RoleModel, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names that PEFT gives them in its files; no copies."""
    found: dict[str, Tensor] = get_peft_model_state_dict(model.base, adapter_name=name, save_embedding_layers=False)
    return found


def write_adapter(model: RoleModel, name: str, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter as PEFT does: its config, and what `adapter_tensors` gave."""
    folder.mkdir(exist_ok=True)
    config = model.base.peft_config[name]
    config.base_model_name_or_path = findable(model.causal_lm.name_or_path)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    _write_tensors(tensors, folder / "adapter_model.safetensors")


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors in one move."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _end_ids(model: RoleModel) -> list[int] | None:
    """Return the tokens that end an answer, the trained one first; None where nobody said."""
    if model.trained_end is None:
        return None
    found = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    others = found if isinstance(found, list) else [found]
    return [model.trained_end, *(i for i in others if i is not None and i != model.trained_end)]


def read_heads(heads: Mapping[str, nn.Linear], folder: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the saved scalar heads into `heads`, in place.

    A critic that has none yet starts as the reward model, whose members then count by their mean. What was never trained is
    left as it is where `heads` has other members, and so is a head of the expected reward that is new.

    Raises:
        ConfigError: when one is missing, or they are for another hidden size.
    """
    state = load_file(folder / HEADS)
    wanted = {name: head for name, head in heads.items() if not _is_new(name, head, manifest)}
    check_heads(folder, manifest, wanted, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, head in wanted.items():
        saved = state[_stored(name, manifest)].to(head.weight.device)
        with torch.no_grad():
            head.weight.copy_(mean_weight(saved) if name == "value" else saved)


def check_heads(
    folder: Path, manifest: Mapping[str, Any], heads: Mapping[str, nn.Linear], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse saved heads that are not those of the model.

    Args:
        folder: that holds them.
        manifest: of the saved model.
        heads: those of the model, also on the meta device.
        found: shapes of the tensors in the file, by name.

    Raises:
        ConfigError: when one is missing, they are for another hidden size, or others in number than the manifest says.
    """
    for name, head in heads.items():
        stored = _stored(name, manifest)
        if stored not in found:
            raise ConfigError(f"{HEADS} in {str(folder)!r} lacks {stored}; save the model again.")
        if found[stored][-1] != head.weight.shape[1]:
            raise ConfigError(
                f"{HEADS} in {str(folder)!r} is for hidden size {found[stored][-1]}, the base has {head.weight.shape[1]}; "
                "use its own base."
            )
        rows = manifest.get("reward_heads", 1) if stored == "reward.weight" else 1
        if found[stored] != (rows, head.weight.shape[1]):
            raise ConfigError(
                f"{HEADS} in {str(folder)!r} has {stored} of shape {list(found[stored])}, where the model has {rows} of it; "
                "save the model again."
            )


def _is_new(name: str, head: nn.Linear, manifest: Mapping[str, Any]) -> bool:
    """Say whether a head starts afresh, whatever the saved model holds."""
    if name == "expected":
        return name not in manifest["heads"]
    return name == "reward" and not manifest["reward_head_trained"] and head.out_features != manifest.get("reward_heads", 1)


def _stored(head: str, manifest: Mapping[str, Any]) -> str:
    # The critic starts as the reward model, its head included.
    return f"{head}.weight" if head in manifest["heads"] else "reward.weight"


def read_trained(model: RoleModel, folder: Path) -> None:
    """Bring adapters, heads, and the base where it is itself trained, to what `write_model` wrote, bit for bit.

    Raises:
        ConfigError: when the folder does not fit the model.
    """
    manifest = read_manifest(folder)
    for name in model.stage.adapters:
        assert isinstance(model.base, PeftModel)  # it has an adapter
        read_adapter(model.base, name, folder / name)
    read_heads({name: model.heads[name] for name in model.heads}, folder, manifest)
    model.reward_head_trained = manifest["reward_head_trained"]
    if model.stage.tunes_base:
        state: dict[str, Tensor] = {}
        for path in sorted((folder / "base").glob("*.safetensors")):
            state |= load_file(path)
        found = model.causal_lm.load_state_dict(state, strict=False)
        if found.unexpected_keys:
            raise ConfigError(f"{str(folder / 'base')!r} is of another model ({found.unexpected_keys[0]}); use its own.")
