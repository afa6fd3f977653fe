"""Short digests that tell whether a model, a tokenizer or the data are still what a run began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

WHOLE = 256 * 2**20
"""Files up to this many bytes are read whole."""
PLACES, BLOCK = 256, 64 * 2**10
"""Of a larger file: how many places are read, and how many bytes at each. 16 MiB of an 8B shard take well under a second."""


CONFIGS = ("config.json", "generation_config.json", "hydra.json", "adapter_config.json")
PLACES_IN_CONFIGS = ("base_model_name_or_path", "_name_or_path", "transformers_version", "peft_version")
"""What a config says of where things lay, and of what wrote it: it computes nothing, and changes when folders are moved."""


def model_digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file of a model that decides what it computes: configs and safetensors, by path."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*/adapter_model.safetensors")])
    configs = [folder / name for name in CONFIGS] + sorted(folder.glob("*/adapter_config.json"))
    found = {path.relative_to(folder).as_posix(): file_digest(path) for path in weights}
    return found | {path.relative_to(folder).as_posix(): _config_digest(path) for path in configs if path.is_file()}


def _config_digest(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _of({name: value for name, value in content.items() if name not in PLACES_IN_CONFIGS})
    except (ValueError, AttributeError, RecursionError):  # whoever reads it says what is wrong
        return file_digest(path)


def weights_digest(name_or_path: str) -> str | None:
    """Return one digest of all weights of a model in a folder or the hub's cache; None where they are not there."""
    folder = model_folder(name_or_path)
    digests = {} if folder is None else {path.name: file_digest(path) for path in folder.glob("*.safetensors")}
    return _of(digests) if digests else None


def file_digest(path: Path) -> str:
    """Return a digest of size and content; of a large file, of its beginning, its end and places in between."""
    stat = path.stat()
    return _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest(path: str, size: int, changed: int) -> str:
    """Read a file once for as long as it stays the same."""
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                found.update(block)
        else:
            for place in range(PLACES):
                file.seek((size - BLOCK) * place // (PLACES - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()[:32]


SAMPLED = 2**16
"""Numbers of a tensor that are looked at, at equal distances: training changes all of them."""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes and values of tensors, of large ones a sample, wherever they lie."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        few = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu()
        found.update(f"{name} {tuple(tensors[name].shape)}".encode())
        found.update(few.numpy().tobytes())
    return found.hexdigest()[:32]


def model_folder(name_or_path: str) -> Path | None:
    """Return where the files of a model lie: the folder itself, or the hub's cache; None where it is not here."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name_or_path, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of vocabulary, special tokens, chat template and how text is cut."""
    content: list[Any] = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        parts = ("normalizer", "pre_tokenizer", "post_processor", "model", "decoder")
        content.append({name: rules.get(name) for name in parts})
    return _of(content)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of a tokenizer's chat template, or of all of them by name; None where it has none."""
    return _of(tokenizer.chat_template) if tokenizer.chat_template else None


def rows_digest(*parts: Iterable[Any]) -> str:
    """Return a digest of tokenised rows, part by part, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(b"part")
        for row in part:
            found.update(repr(row).encode("utf-8", "surrogatepass"))
            if (margin := getattr(row, "margin", None)) is not None:
                found.update(f"margin {margin!r}".encode())
    return found.hexdigest()[:32]


def _of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
