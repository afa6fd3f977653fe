"""What this program writes into a run folder, by name: only that is ever removed from one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"
STATE, LOG, SUMMARY = "state.json", "log.txt", "summary.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
EARLIER = "earlier-"
"""Begins the names of folders that hold what runs logged which came to no checkpoint and were begun anew."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "normalizer.json", "emoji.json", "bpe.codes", "dict.txt", "byte_maps.json"),
    *("tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("vocab.model", "tiktoken.model", "tekken.json", "prophetnet.tokenizer", "entity_vocab.json", "word_shape.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "source.spm", "target.spm", "word_pronunciation.json"),
)
TOKENIZER_FOLDER = "additional_chat_templates"
"""What `save_pretrained` of a tokenizer writes, in transformers 4 and 5: files, and a folder where it has several templates."""

MODEL_FILES = ("hydra.json", "heads.safetensors")
WRITTEN_FILES = (*MODEL_FILES, CONFIG, METRICS, SAMPLES, LOG, SUMMARY, *TOKENIZER_FILES)
"""The model goes first: what is left of a folder that is being cleared must not look like one that holds a model."""

_CHECKPOINT = ("step-", ".writing-", ".dropping-")
WRITTEN_FOLDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sft", "reward", "actor", "critic"), ("adapter_config.json", "adapter_model.safetensors")),
    "base": ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    CHECKPOINTS: tuple(f"{begin}*/**/*.{kind}" for begin in _CHECKPOINT for kind in ("json", "safetensors")),
    "plots": tuple(f"{name}.png" for name in ("reward", "kl", "length", "loss", "perplexity", "pair_accuracy", "memory")),
    "tensorboard": ("**/events.out.tfevents.*", "**/hparams.yml"),
    "wandb": ("*run*", "debug*.log"),
    TOKENIZER_FOLDER: ("*.jinja",),
    f"{EARLIER}*": (METRICS, SAMPLES, LOG),
}
"""Folders, and what is written into them; whatever else lies there is somebody's own."""


def clear(folder: Path, *, earlier: bool = True) -> None:
    """Remove what this program writes from a run folder but its state and its lock, and nothing else.

    Args:
        earlier: what `set_aside` kept too.
    """
    for name in WRITTEN_FILES:
        for path in (folder / name, folder / f"{name}.partial"):
            if path.is_symlink() or path.is_file():
                path.unlink()
    for name, patterns in WRITTEN_FOLDERS.items():
        if name == f"{EARLIER}*" and not earlier:
            continue
        for place in sorted(folder.glob(name)):
            if place.is_symlink():
                place.unlink()  # what it leads to stays
            elif place.is_dir():
                _clear(place, patterns)


def _clear(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for place in (*sorted((path for path in _below(folder) if path.is_dir()), reverse=True), folder):
        if not any(place.iterdir()):
            place.rmdir()


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_symlink())


def set_aside(folder: Path) -> str | None:
    """Move what a run logged that came to no checkpoint into a folder of its own; return its name, None where nothing was."""
    found = [folder / name for name in (METRICS, SAMPLES, LOG) if (folder / name).is_file() and (folder / name).stat().st_size]
    if all(path.name == LOG for path in found):
        return None
    number = 1
    while (folder / f"{EARLIER}{number}").exists():
        number += 1
    aside = folder / f"{EARLIER}{number}"
    aside.mkdir()
    for path in found:
        path.replace(aside / path.name)
    return aside.name
