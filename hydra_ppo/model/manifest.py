"""`hydra.json`: which base a saved model stands on, and which role uses which adapter and head."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import weights_digest
from hydra_ppo.runtime.files import read_regular

MANIFEST = "hydra.json"

UNTRAINED_HEAD = (
    "reward.sources names the reward head, but this model's was never trained; run hydra-ppo sft first, or name a function or "
    "a classifier."
)
"""What PPO and its dry run say of a base without a trained reward head."""
UNSCORED = (
    "rehearsal.data selects the best answers by the reward head, and this model's was never trained; run hydra-ppo sft first, "
    "or use ptx."
)
"""What they say of one where answers are to be rehearsed."""


FORMAT, WITH_HEADS = 1, 2
"""Numbers of what `hydra.json` says and means; another one is refused. The second has several reward heads, or one of the
expected reward: who reads the first alone would take something else for the score."""
NEEDED = ("base", "roles", "adapters", "heads", "reward_head_trained", "trunk_layers")
NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What adapters and heads may be called: they are names of folders and tensors, and a path would lead out of the run."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `hydra.json` of a saved model says.

    Raises:
        ConfigError: where it says too little, something of another kind, or was written by another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a manifest of this program ({error}); save the model again.") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{path} is not a manifest of this program ({type(manifest).__name__}); save the model again.")
    if (found := manifest.get("format", FORMAT)) not in (FORMAT, WITH_HEADS):
        raise ConfigError(
            f"{path}: format={found!r} is not the {FORMAT} or {WITH_HEADS} that this version reads; use the one that wrote it."
        )
    if missing := set(NEEDED) - manifest.keys():
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}; save the model again.")
    if not _is_sound(manifest):
        raise ConfigError(f"{path} holds values of other types than this program writes; save the model again.")
    for what in ("adapters", "heads"):
        for name in manifest[what]:
            if NAME.fullmatch(name) is None:
                raise ConfigError(f"{path}: {what} has {name!r}, which is no plain name; save the model again.")
    for role, spec in manifest["roles"].items():
        if spec["adapter"] is not None and spec["adapter"] not in manifest["adapters"]:
            raise ConfigError(f"{path}: role {role!r} uses adapter {spec['adapter']!r}, which it does not list; save it again.")
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
        and all(isinstance(role["adapter"], str | None) and isinstance(role["head"], str) for role in roles.values())
        and all(isinstance(manifest[name], list) for name in ("adapters", "heads"))
        and all(isinstance(item, str) for name in ("adapters", "heads") for item in manifest[name])
        and isinstance(manifest["reward_head_trained"], bool)
        and isinstance(manifest["trunk_layers"], int)
        and type(manifest.get("reward_heads", 1)) is int
        and manifest.get("reward_heads", 1) > 0
        and _is_list_of_ids(manifest.get("end_ids"))
        and _are_bounds(manifest.get("value_range"))
        and all(isinstance(manifest.get(name), str | None) for name in ("quantization", "dtype", "template", "embeddings"))
    )


def _is_list_of_ids(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(i, int) for i in value))


def _are_bounds(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(isinstance(i, int | float) for i in value))


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


def held_otherwise(
    manifest: Mapping[str, Any], quantization: str | None, dtype: str, embeddings: str | None = None
) -> str | None:
    """Say that adapters and heads are read on a base held otherwise than while they trained; None where it is the same.

    Args:
        manifest: of the saved model; what was saved before a thing was written down is not compared.
        quantization: of the base that they are read on.
        dtype: that it computes in.
        embeddings: how its embeddings and output head are held; they were plain before that was written down.
    """
    before = (manifest.get("quantization", quantization), manifest.get("dtype", dtype), manifest.get("embeddings"))
    now = (quantization, dtype, embeddings)
    heads = [name for name in manifest["heads"] if name != "reward" or manifest["reward_head_trained"]]
    used = [f"adapter {name}" for name in manifest["adapters"]] + [f"{name} head" for name in heads]
    if before == now or not used:
        return None
    wanted = []
    if before[0] != quantization:
        wanted.append(f"model.quantization={before[0] or 'null'}")
    if before[1] != dtype:
        wanted.append(f"model.dtype={SHORT.get(before[1], before[1])}")
    if before[2] != embeddings:
        wanted.append(f"model.quantize_embeddings={before[2] or 'null'}")
    return (
        f"trained on {_held(*before)}, read on {_held(*now)}: {', '.join(used)}; log-probs and scores differ by "
        f"the rounding, {' and '.join(wanted)} gives those of the training."
    )


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _held(quantization: str | None, dtype: str, embeddings: str | None) -> str:
    short = SHORT.get(dtype, dtype)
    held = f"an unquantised base in {short}" if quantization is None else f"a base in {quantization}, computing in {short}"
    return held if embeddings is None else f"{held} with embeddings in {embeddings}"


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
