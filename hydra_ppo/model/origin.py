"""Which base and adapter states came of, so that heads trained on them are read on the same ones and on no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import tensors_digest, weights_digest
from hydra_ppo.model.loading import quantization_of
from hydra_ppo.model.manifest import MANIFEST, base_folder, read_manifest
from hydra_ppo.model.quantized_embeddings import embeddings_kind
from hydra_ppo.model.role_model import RoleModel
from hydra_ppo.model.saving import adapter_tensors


@dataclass(frozen=True)
class Origin:
    """What final states depend on beside the text.

    Attributes:
        base: digest of the base's weights; None where they are not in a folder.
        adapter: digest of the reward role's adapter; None where it has none.
        end: the token that answers end in, at which states are read.
        hidden_size: H.
        quantization, embeddings, dtype: how the base is held, which rounds the states and no more.
    """

    base: str | None
    adapter: str | None
    end: int
    hidden_size: int
    quantization: str | None
    embeddings: str | None
    dtype: str

    def as_values(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def read(cls, values: Any, place: str) -> Origin:
        """Return what `as_values` gave.

        Raises:
            ConfigError: where it is anything else.
        """
        kinds = {"end": int, "hidden_size": int, "dtype": str}
        names = {member.name for member in fields(cls)}
        sound = isinstance(values, Mapping) and values.keys() == names
        sound = sound and all(isinstance(values[name], kinds.get(name, str | None)) for name in names)
        if not sound:
            raise ConfigError(f"{place} does not say what its states came of; write it again.")
        return cls(**values)


def origin_of(model: RoleModel, end: int) -> Origin:
    """Return what the reward role's states of a model come of.

    Args:
        model: with a reward role; of a simulated one, whose tensors have no numbers, the adapter has no digest.
        end: the token that answers end in.
    """
    adapter = model.roles["reward"].adapter
    digest = None
    if adapter is not None:
        tensors = adapter_tensors(model, adapter)
        simulated = any(detect_fake_mode([tensor]) is not None for tensor in tensors.values())
        digest = None if simulated else tensors_digest(tensors)
    return Origin(
        base=weights_digest(str(model.causal_lm.name_or_path)),
        adapter=digest,
        end=end,
        hidden_size=model.architecture.hidden_size,
        quantization=quantization_of(model.causal_lm),
        embeddings=embeddings_kind(model.causal_lm),
        dtype=str(model.causal_lm.dtype).removeprefix("torch."),
    )


def check_origin(then: Origin, now: Origin, what: str) -> str | None:
    """Refuse to read heads on states of another kind than they were trained on; return a line where states are only rounded so.

    Args:
        then: of the states that they were trained on.
        now: of those that they would be read on.
        what: names the heads, as a setting.

    Raises:
        ConfigError: saying what differs.
    """
    for name, words in (("base", "base"), ("adapter", "reward adapter")):
        before, found = getattr(then, name), getattr(now, name)
        if before != found and (name == "adapter" or None not in (before, found)):
            raise _changed(what, words)
    if then.hidden_size != now.hidden_size:
        raise ConfigError(f"{what} is for hidden size {then.hidden_size}, the model has {now.hidden_size}; use its own model.")
    if then.end != now.end:
        raise ConfigError(
            f"{what} reads states at token {then.end}, in which answers ended then; they end in {now.end} here; set "
            "data.end_of_turn to that token, or run hydra-ppo features again."
        )
    held = [(then.quantization, then.embeddings, then.dtype), (now.quantization, now.embeddings, now.dtype)]
    if held[0] == held[1]:
        return None
    before, after = (", ".join(str(part) for part in parts if part is not None) for parts in held)
    return f"{what}: trained on states of a base in {before}, read on one in {after}; scores differ by the rounding."


def check_files(then: Origin, name_or_path: str, what: str) -> None:
    """Refuse heads whose base or reward adapter is not that of a model in files, before a weight is read.

    Args:
        then: of the states that the heads were trained on.
        name_or_path: a run of this program, or a plain base.
        what: names the heads, as a setting.

    Raises:
        ConfigError: saying what differs.
    """
    folder = Path(name_or_path)
    saved = (folder / MANIFEST).is_file()
    base = weights_digest(base_folder(folder) if saved else name_or_path)
    if None not in (then.base, base) and then.base != base:
        raise _changed(what, "base")
    adapter = read_manifest(folder)["roles"].get("reward", {}).get("adapter") if saved else None
    found = None if adapter is None else _file_digest(folder / adapter / "adapter_model.safetensors")
    if found != then.adapter:
        raise _changed(what, "reward adapter")


def _file_digest(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in names}
    return tensors_digest(tensors)


def _changed(what: str, words: str) -> ConfigError:
    return ConfigError(
        f"{what} was trained on states of another {words} than this model's; run hydra-ppo features and heads on this one, or "
        "name the run that they were made of."
    )
