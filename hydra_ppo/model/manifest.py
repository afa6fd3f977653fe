"""`hydra.json`: which base a saved model stands on, and which role uses which adapter and head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import weights_digest

MANIFEST = "hydra.json"

UNTRAINED_HEAD = (
    "reward.sources names the reward head, but this model's was never trained; run hydra-ppo sft first, or name a function or "
    "a classifier."
)
"""What PPO and its dry run say of a base without a trained reward head."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `hydra.json` of a saved model says; raises ConfigError where it says too little."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        missing = {"base", "roles", "adapters", "heads", "reward_head_trained", "trunk_layers"} - manifest.keys()
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / MANIFEST} is not a manifest of this program ({error}); save the model again.") from error
    if missing:
        raise ConfigError(f"{folder / MANIFEST} lacks {', '.join(sorted(missing))}; save the model again.")
    if not _is_sound(manifest):
        raise ConfigError(f"{folder / MANIFEST} holds values of other types than this program writes; save the model again.")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Say whether values have the types that `saving.write_model` gives them."""
    base, roles = manifest["base"], manifest["roles"]
    return (
        isinstance(base, dict)
        and isinstance(base.get("name_or_path"), str)
        and isinstance(base.get("relative"), bool)
        and isinstance(roles, dict)
        and all(isinstance(role, dict) and role.keys() == {"adapter", "head"} for role in roles.values())
        and all(isinstance(manifest[name], list) for name in ("adapters", "heads"))
        and isinstance(manifest["trunk_layers"], int)
        and _is_list_of_ids(manifest.get("end_ids"))
        and isinstance(manifest.get("quantization"), str | None)
    )


def _is_list_of_ids(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(i, int) for i in value))


def base_folder(folder: Path) -> str:
    """Return the name or path of the base that a saved model stands on."""
    base = read_manifest(folder)["base"]
    if not base["relative"]:
        return base["name_or_path"]
    path = (folder / base["name_or_path"]).resolve()
    if not path.is_dir():
        raise ConfigError(
            f"model.name_or_path={str(folder)!r} needs its base at {base['name_or_path']!r} beside it; put it back there."
        )
    return os.path.relpath(path)


def describe_base(name_or_path: str, folder: Path) -> dict[str, Any]:
    """A local base is named relative to the folder, so that both can be moved together."""
    if Path(name_or_path).is_dir():
        return {"name_or_path": os.path.relpath(Path(name_or_path).resolve(), folder.resolve()), "relative": True}
    return {"name_or_path": name_or_path, "relative": False}


def other_quantization(manifest: Mapping[str, Any], held: str | None) -> str | None:
    """Say that adapters and heads are read on another quantisation than they were trained on; None where they are not.

    Args:
        manifest: of the saved model; what was saved before it was written down is not compared.
        held: quantisation of the base that they are read on.
    """
    trained = manifest.get("quantization", held)
    heads = [name for name in manifest["heads"] if name != "reward" or manifest["reward_head_trained"]]
    used = [f"adapter {name}" for name in manifest["adapters"]] + [f"{name} head" for name in heads]
    if trained == held or not used:
        return None
    return (
        f"trained on {_held(trained)}, read on {_held(held)}: {', '.join(used)}; log-probs and scores differ by the rounding, "
        f"model.quantization={trained or 'null'} gives those of the training."
    )


def _held(quantization: str | None) -> str:
    return "an unquantised base" if quantization is None else f"a base in {quantization}"


def findable(name_or_path: str | None) -> str:
    """Return the name of a base as it is found from any working directory: a hub name, or the absolute path of a folder."""
    name = str(name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def check_base(folder: Path, base: str) -> None:
    """Refuse adapters on another base than they were trained on; nothing is known of those saved before it was written down.

    Raises:
        ConfigError: naming both folders.
    """
    known, found = read_manifest(folder)["base"].get("weights"), weights_digest(base)
    if known is not None and found is not None and known != found:
        raise ConfigError(
            f"model.name_or_path={str(folder)!r} holds adapters of another base than {base!r}, whose weights have changed; "
            "put their own base back, or train them again."
        )
