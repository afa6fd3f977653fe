"""`hydra-ppo quantize`: writes a base with quantised linear layers, once, so that runs begin in seconds.

What is written is what transformers itself writes and reads: the layers in bitsandbytes' own form, and a config that says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.aside import check_empty, whole_or_nothing
from hydra_ppo.cli.choices import Quantization
from hydra_ppo.cli.export import copy_tokenizer
from hydra_ppo.cli.model_files import MIB, check_model, check_reachable
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import model_folder
from hydra_ppo.model.manifest import MANIFEST, base_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARD = "2GB"
"""Largest file of weights: on a GPU the weights of one are copied to the host before they are written."""
SPARE = 1.02
"""How much more than its weights a folder takes, at most: headers, and the statistics' own statistics."""
EVERY = 5.0
"""Seconds between two lines on how far reading has come."""
GENERATION = "generation_config.json"


def quantize_model(
    name_or_path: str,
    output: Path,
    *,
    quantization: Quantization = "nf4",
    dtype: str = "auto",
    device: str = "auto",
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Write a base with quantised linear layers for this program and for transformers; return what a user should know.

    Args:
        name_or_path: model folder or hub name, unquantised.
        output: new folder: config, safetensors, generation config, tokenizer.
        quantization: int8, nf4 or fp4.
        dtype: of everything else, and what 4-bit layers compute in: auto, fp32, bf16 or fp16. auto is the stored one.
        device: where it is quantised: auto, cpu, cuda or cuda:N.
        tell: gets lines on how far it has come.

    Memory: the quantised base once, on the device, and one weight of a layer.

    Raises:
        ConfigError: when `name_or_path` is no unquantised base, `output` is not empty, or the disk is too small.
        UnsupportedModelError: when it cannot be a base.
    """
    path = Path(name_or_path).expanduser()
    name = str(path) if path.exists() else name_or_path
    _check_plain(name)
    check_empty("output", output)
    from hydra_ppo.compat import stored_dtype
    from hydra_ppo.model.architecture import inspect_architecture
    from hydra_ppo.model.for_others import save_for_others
    from hydra_ppo.model.loading import DTYPES, load_base, quantization_config, resolve_device
    from hydra_ppo.model.whole import causal_class, skeleton

    resolve_device(device)
    empty = skeleton(name)
    inspect_architecture(empty)
    stored = stored_dtype(empty.config)
    if dtype == "auto":
        dtype = next((short for short, known in DTYPES.items() if known == stored), "fp32")
    compute = DTYPES[dtype]
    before, after = (sum(sizes) for sizes in zip(*_sizes(empty, quantization, compute), strict=True))
    _check_room(output, after * SPARE)
    tell(f"Quantising {name} to {quantization}, the rest in {dtype}: {before / MIB:,.1f} MiB become {after / MIB:,.1f} MiB.")
    begun = time.monotonic()
    options: dict[str, Any] = {"quantization": quantization, "attention": "auto", "dtype": dtype, "device": device}
    progress = _Progress(sum(1 for _ in empty.parameters()), tell)
    model = load_base(name, trust_remote_code=False, see=lambda model, weight: progress(weight), **options)
    if getattr(model.config, "quantization_config", None) is None:  # quantised after it was read, by older versions
        model.config.quantization_config = quantization_config(quantization, compute)
    with whole_or_nothing(output) as aside:
        notes = save_for_others(model, aside, max_shard_size=SHARD)
        notes += _copy_texts(name, aside)
        skeleton(str(aside))  # what is written is looked for under the names that a reader looks for
        size = sum(file.stat().st_size for file in aside.glob("*.safetensors"))
    if before - after < before / 3:
        notes.append(
            f"most of the weights are in no linear layer (as experts that are one tensor), and stay in {dtype}: bitsandbytes "
            "quantises linear layers alone"
        )
    return [
        *notes,
        f"Wrote {output}, {size / MIB:,.1f} MiB of weights, in {time.monotonic() - begun:,.0f} s. Name it in "
        f"model.name_or_path, or load it with {causal_class(model.config).__name__}.from_pretrained({str(output)!r}).",
    ]


class _Progress:
    """Says now and then how many of the weights have come."""

    def __init__(self, total: int, tell: Callable[[str], None]) -> None:
        self.total, self.tell = total, tell
        self.count, self.said = 0, time.monotonic()

    def __call__(self, name: str) -> None:
        self.count += 1
        if (now := time.monotonic()) - self.said >= EVERY:
            self.said = now
            self.tell(f"{self.count} of {self.total} weights")


def _check_plain(name: str) -> None:
    """Refuse what is no unquantised base, before a weight is read.

    Raises:
        ConfigError: saying what it is, and what to name.
    """
    what, path = f"model={name!r}", Path(name)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        raise ConfigError(f"{what} is GGUF, which is quantised in another way; name the folder with the safetensors weights.")
    if (path / MANIFEST).is_file():
        raise ConfigError(
            f"{what} is a run of this program, not a base; quantise its base {base_folder(path)!r}, or what hydra-ppo export "
            "makes of it."
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{what} is an adapter; quantise its base, and name the adapter in model.adapter.")
    check_model("model", name)
    check_reachable("model", name)
    from hydra_ppo.model.prequantized import stored_quantization
    from hydra_ppo.model.whole import read_config

    if (kind := stored_quantization(read_config(name))) is not None:
        raise ConfigError(
            f"{what} is quantised already ({kind}); name it in model.name_or_path as it is, or quantise the model that it was "
            "made of."
        )


def _sizes(empty: PreTrainedModel, quantization: Quantization, compute: torch.dtype) -> list[tuple[int, int]]:
    """Return (bytes unquantised, bytes written) of each weight of a model on the meta device."""
    from torch import nn

    head = empty.get_output_embeddings()
    found = []
    seen: set[int] = set()
    for module in empty.modules():
        linear = (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and module is not head
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            count = weight.numel()
            plain = count * compute.itemsize
            if not linear or key != "weight":
                found.append((plain, plain))
            elif quantization == "int8":  # a scale for each row
                found.append((plain, count + 4 * max(weight.shape)))
            else:  # 64 numbers share a scale of a byte, 256 scales share one in fp32; two tables, and some settings in JSON
                found.append((plain, count // 2 + count // 64 + count // 4096 + 4 * (256 + 16) + 256))
    return found


def _check_room(output: Path, needed: float) -> None:
    """Refuse a disk that cannot hold what will be written.

    Raises:
        ConfigError: naming both sizes.
    """
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"output={str(output)!r} needs {needed / MIB:,.0f} MiB, and its disk has {free / MIB:,.0f} MiB free; make room, or "
            "choose another folder."
        )


def _copy_texts(name: str, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config as they are; say where there is no tokenizer."""
    source = model_folder(name)
    if source is None or source.resolve() != Path(name).resolve():
        _bring_tokenizer(name)  # of a hub model only what was asked for is on this machine
        source = model_folder(name)
    if source is None:
        return ["no tokenizer was found; put one into the folder before a run"]
    copy_tokenizer(source, target)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)
    known = (target / "tokenizer_config.json").is_file()
    return [] if known else [f"{name} holds no tokenizer; put one into the folder before a run"]


def _bring_tokenizer(name: str) -> None:
    from hydra_ppo.cli.export import load_tokenizer_of

    try:
        load_tokenizer_of(Path(name))
    except ConfigError:
        return  # what was looked for and not found is said by who copies
