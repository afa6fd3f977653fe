"""The files of a model, found and looked through without reading a weight: folders, hub names, headers of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import read_manifest
from hydra_ppo.runtime.files import irregular

MIB = 2**20
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses more."""
SECONDS = 5
"""That the hub may take to say whether it has a model."""
NOT_CHECKED = "not a local folder: not checked, would be downloaded"


def check_model(setting: str, name_or_path: str) -> str:
    """Check the files of a model and say in a few words what was found.

    Raises:
        ConfigError: A path that does not exist, a folder without config or weights, or a file that is missing or torn.
    """
    path = Path(name_or_path)
    name = f"{setting}={name_or_path!r}"
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}); check the path.") from None
    if is_file:
        raise ConfigError(f"{name} is a file; name the folder that holds it.")
    if not path.is_dir():
        _check_hub_form(name, name_or_path)
        return NOT_CHECKED
    if (strange := irregular(path)) is not None:
        raise ConfigError(f"{name}: {strange} is not a regular file; copy the model again.")
    if (path / "hydra.json").is_file():
        return _check_saved_model(name, path)
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise ConfigError(f"{name} is an adapter; name its base there, and this folder in model.adapter.")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{name} holds neither config.json nor hydra.json; name a model folder or a run of sft or ppo.")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():  # which transformers prefers
        shards = ["model.safetensors"]
    elif index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{name} holds a broken {index.name}; copy the model again.") from None
        if missing := [shard for shard in shards if not (path / shard).is_file()]:
            raise ConfigError(f"{name} lacks {missing[0]} ({len(missing)} of {len(shards)} shards); copy the model again.")
    elif list(path.glob("pytorch_model*.bin*")):
        raise ConfigError(f"{name} holds weights as pytorch_model.bin only; save them again as safetensors.")
    else:
        raise ConfigError(f"{name} holds config.json but no weights; add model.safetensors.")
    for shard in shards:
        check_weights(name, path / shard)
    size = sum((path / shard).stat().st_size for shard in shards)
    return f"local folder, {size / MIB:,.1f} MiB of weights"


def _check_hub_form(name: str, given: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in a list of names

    try:
        validate_repo_id(given)
    except HFValidationError:
        raise ConfigError(f"{name} names no such folder; check the path.") from None


def check_reachable(setting: str, name_or_path: str) -> None:
    """Ask, once and briefly, whether a model that is no folder can be had: from the hub's cache, or from the hub.

    Raises:
        ConfigError: where it cannot. A folder, and a saved model whose base is one, is not looked at.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    from hydra_ppo.model.fingerprint import model_folder
    from hydra_ppo.model.manifest import MANIFEST, base_folder
    from hydra_ppo.model.whole import weight_files

    name = f"{setting}={name_or_path!r}"
    if (Path(name_or_path) / MANIFEST).is_file():
        name, name_or_path = f"the base of {name}, {base_folder(Path(name_or_path))!r},", base_folder(Path(name_or_path))
    if Path(name_or_path).is_dir():
        return
    _check_hub_form(name, name_or_path)
    folder = model_folder(name_or_path)
    if folder is not None and (files := weight_files(folder)) and all(path.is_file() for path in files):
        return
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE forbids to ask the hub"
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name_or_path, "config.json"), timeout=SECONDS)
            return
        except GatedRepoError:
            why = "the hub wants to know who asks (hf auth login)"
        except HfHubHTTPError as error:
            why = f"the hub answers {getattr(error.response, 'status_code', 'with an error')}"
        except Exception as error:  # of a client that changes with the version of the package
            why = f"the hub cannot be reached ({type(error).__name__})"
    raise ConfigError(f"{name} names no such folder, nor a model in the hub's cache, and {why}; check the path or the name.")


def _check_saved_model(name: str, path: Path) -> str:
    base, heads = check_adapters(name, path), read_manifest(path).get("reward_heads", 1)
    base_name, relative = str(base["name_or_path"]), base["relative"]
    saved = "saved by this program" + (f" with {heads} reward heads" if heads > 1 else "")
    if not relative:
        return f"{saved}; base {base_name}: {check_model('the base of ' + name, base_name)}"
    base_path = path / base_name
    if not base_path.is_dir():
        raise ConfigError(f"{name} needs its base at {base_name!r} beside it; put it back there.")
    return f"{saved}; base: {check_model('the base of ' + name, str(base_path))}"


def check_adapters(name: str, path: Path) -> dict[str, Any]:
    """Check what a saved model holds itself, and return what it says of its base.

    Raises:
        ConfigError: with ``name``, and what is missing or torn.
    """
    manifest = read_manifest(path)
    for adapter in manifest["adapters"]:
        _check_adapter(name, path, adapter)
    if manifest["heads"]:
        if not (path / "heads.safetensors").is_file():
            raise ConfigError(f"{name} lacks heads.safetensors; save the model again.")
        check_weights(name, path / "heads.safetensors", "save the model again")
    base: dict[str, Any] = manifest["base"]
    return base


def _check_adapter(name: str, path: Path, adapter: str) -> None:
    if (path / adapter).is_dir() and (strange := irregular(path / adapter)) is not None:
        raise ConfigError(f"{name}: {adapter}/{strange} is not a regular file; save the model again.")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / adapter / file).is_file():
            raise ConfigError(f"{name} lacks {adapter}/{file}; save the model again.")
    try:
        json.loads((path / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{name} holds a broken {adapter}/adapter_config.json; save the model again.") from None
    check_weights(name, path / adapter / "adapter_model.safetensors", "save the model again")


def check_weights(name: str, path: Path, remedy: str = "copy the model again") -> None:
    """Refuse a safetensors file that is shorter than its header says, or has none; no tensor is read.

    Raises:
        ConfigError: with ``name``, the file and ``remedy``.
    """
    size = path.stat().st_size
    needed = None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size >= 8 and length <= LONGEST_HEADER:
            try:
                tensors = json.loads(file.read(length) or "{}")
                needed = 8 + length + max((v["data_offsets"][1] for k, v in tensors.items() if k != "__metadata__"), default=0)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                needed = 8 + length if 8 + length > size else None
    if needed is None:
        raise ConfigError(f"{name}: {path.name} is not safetensors; {remedy}.")
    if size < needed:
        raise ConfigError(f"{name}: {path.name} has {size:,} bytes of {needed:,} or more; {remedy}.")
