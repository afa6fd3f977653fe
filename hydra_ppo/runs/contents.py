"""What this program writes into a run folder, by name: only that is ever removed from one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hydra_ppo.runtime.files import PARTIAL, write_whole

CONFIG, METRICS, SAMPLES, ALARMS = "config.yaml", "metrics.jsonl", "samples.jsonl", "alarms.jsonl"
STATE, LOG, SUMMARY, REPORT = "state.json", "log.txt", "summary.json", "report.html"
CHECKPOINTS = "checkpoints"
VLLM = "vllm"
"""Folder of what vLLM servers read while the run goes on: versions of its adapters."""
LOCK = ".lock"
EARLIER = "earlier-"
"""Begins the names of folders that hold what is left of runs which came to no checkpoint and were begun anew."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "normalizer.json", "emoji.json", "bpe.codes", "dict.txt", "byte_maps.json"),
    *("tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("vocab.model", "tiktoken.model", "tekken.json", "prophetnet.tokenizer", "entity_vocab.json", "word_shape.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "source.spm", "target.spm", "word_pronunciation.json"),
)
TOKENIZER_FOLDER = "additional_chat_templates"
"""What `save_pretrained` of a tokenizer writes, in transformers 4 and 5: files, and a folder where it has several templates."""

MANIFEST, BASE = "hydra.json", "base"
MODEL_FILES = (MANIFEST, "heads.safetensors")
ADAPTERS = ("sft", "reward", "actor", "actor_ema", "critic")
WRITTEN_FILES = (*MODEL_FILES, CONFIG, METRICS, SAMPLES, ALARMS, LOG, SUMMARY, REPORT, *TOKENIZER_FILES)
"""The model goes first: what is left of a folder that is being cleared must not look like one that holds a model."""

_CHECKPOINT = ("step-", ".writing-", ".dropping-")
WRITTEN_FOLDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ADAPTERS, ("adapter_config.json", "adapter_model.safetensors")),
    BASE: ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    CHECKPOINTS: tuple(f"{begin}*/**/*.{kind}" for begin in _CHECKPOINT for kind in ("json", "safetensors")),
    "plots": (
        *(f"{name}.png" for name in ("reward", "kl", "length", "loss", "perplexity", "pair_accuracy", "memory")),
        *("monitor.png", "over_optimisation.png"),
    ),
    "tensorboard": ("**/events.out.tfevents.*", "**/hparams.yml"),
    "wandb": ("*run*", "debug*.log"),
    TOKENIZER_FOLDER: ("*.jinja",),
    VLLM: ("hydra-*/adapter_config.json", "hydra-*/adapter_model.safetensors*"),
}
"""Folders, and what is written into them; whatever else lies there is somebody's own."""


def clear(folder: Path) -> None:
    """Remove what this program writes from a run folder, and nothing else; its state, its lock and what was set aside stay."""
    for name in WRITTEN_FILES:
        for path in (folder / name, folder / f"{name}{PARTIAL}"):
            if path.is_symlink() or path.is_file():
                path.unlink()
    for left in folder.glob(f".writing-{EARLIER}*"):
        shutil.rmtree(left)
    for name, patterns in WRITTEN_FOLDERS.items():
        place = folder / name
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
    """Keep what a run left that came to no checkpoint in a folder of its own: metrics, samples, log, a model if it saved one.

    Nothing is removed: `clear` does that, once all of it is kept.

    Returns:
        Its name; None where nothing was worth it.
    """
    model = (folder / MANIFEST).is_file()
    logged = [name for name in (METRICS, SAMPLES, ALARMS) if (folder / name).is_file() and (folder / name).stat().st_size]
    if not model and not logged:
        return None
    number = 1
    while (folder / f"{EARLIER}{number}").exists():
        number += 1
    partial, aside = folder / f".writing-{EARLIER}{number}", folder / f"{EARLIER}{number}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (*logged, LOG, *((*MODEL_FILES[1:], *TOKENIZER_FILES) if model else ())):
        if (folder / name).is_file():
            _link(folder / name, partial / name)
    if model:
        for name in (*ADAPTERS, BASE, TOKENIZER_FOLDER):
            if (folder / name).is_dir():
                shutil.copytree(folder / name, partial / name, copy_function=_link)
        write_whole(partial / MANIFEST, _one_deeper((folder / MANIFEST).read_text(encoding="utf-8")))
    partial.replace(aside)
    return aside.name


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the disk has only one for each."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _one_deeper(manifest: str) -> str:
    """Name a base from one folder further down."""
    try:
        content = json.loads(manifest)
        base = content["base"]
        if base["relative"] and base["name_or_path"] != BASE:
            base["name_or_path"] = os.path.join("..", base["name_or_path"])
        return json.dumps(content, indent=2) + "\n"
    except (ValueError, KeyError, TypeError):  # not ours: as it is
        return manifest
