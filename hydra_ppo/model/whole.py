"""Whether a model is whole: each weight that it computes with comes from its files, and none is made up in its place."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from hydra_ppo.compat import match_names
from hydra_ppo.errors import ConfigError, HydraError, UnsupportedModelError
from hydra_ppo.model.fingerprint import model_folder
from hydra_ppo.runtime.files import irregular

logger = logging.getLogger("hydra_ppo")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@contextmanager
def saying_why(name_or_path: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a causal LM into one line with the model's name.

    Raises:
        ConfigError: when it cannot be found or read, or its files do not fit its config.
        UnsupportedModelError: when it is no causal LM.
    """
    what = f"model.name_or_path={name_or_path!r}"
    try:
        yield
    except HydraError:
        raise
    except (OSError, SafetensorError) as error:
        where = "the folder" if Path(name_or_path).exists() else "no folder of that name, and the hub"
        raise ConfigError(
            f"{what} cannot be loaded ({where}): {first_line(error)}; "
            "name a folder with config.json and safetensors weights, or a model on the hub."
        ) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{what} cannot be loaded as a causal LM: {first_line(error)}; use one of the supported families."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "meta tensor" in str(error):  # transformers 4 looks for tied weights under one of their names alone
            raise ConfigError(
                f"{what} lacks weights, or holds tied ones under another name than this version of transformers looks for; "
                "save the model again with it, or update transformers."
            ) from error
        # From transformers 5 on: where a weight is put together from several, and some of these are missing.
        if "conversion of the weights" not in str(error):
            raise
        raise ConfigError(
            f"{what} holds only parts of some weights, as where one expert lacks a tensor, and none is made up; copy the model "
            "again."
        ) from error


def causal_class(config: PretrainedConfig) -> Any:
    """Return the auto class that builds a model which says the next token.

    Checkpoints for text and images come as one class with the language model inside; where transformers has a causal LM for
    them at all, it may be the inner one, under other names. It is taken whole, so that names stay those of the checkpoint; no
    image is ever given to it.
    """
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    wrapped = config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not own else AutoModelForCausalLM


def load_whole(kind: Any, name_or_path: str, what: str, **options: Any) -> PreTrainedModel:
    """Load a model whose files hold every weight of it, from safetensors only.

    Args:
        kind: the auto class.
        name_or_path: model folder, or name on the hub.
        what: setting=value, which begins the error.
        options: for `from_pretrained`.

    Memory: the model once.

    Raises:
        ConfigError: when weights are missing, or of another shape than the config says; the first by name, and how many.
    """
    # Weights of another shape are to be named with both shapes, not raised at; nothing that lacks some leaves this function.
    options = {"trust_remote_code": False} | options  # where nothing is said, transformers asks on standard input
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    model, found = kind.from_pretrained(name_or_path, **options)
    refuse_incomplete(what, found)
    if unused := sorted(found["unexpected_keys"]):
        logger.warning("%s: %s of its files not used by %s", what, _counted(unused, "weight"), type(model).__name__)
    return model


def refuse_incomplete(what: str, found: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model whose files lack weights, or hold some in another shape.

    Args:
        what: setting=value, which begins the error.
        found: what `from_pretrained` returns with `output_loading_info=True`. Weights that are tied to others, and buffers that
            are computed, are not among its missing keys.

    Raises:
        ConfigError: naming the first, and how many.
    """
    if missing := sorted(found["missing_keys"]):
        others = sorted(found["unexpected_keys"])
        instead = f" (it holds {_counted(others, 'weight')} that the model does not know)" if others else ""
        raise ConfigError(
            f"{what} lacks {_counted(missing, 'weight')} of the model{instead}, and none is made up; copy the model again, or "
            "save all of it, under the names of its class."
        )
    if wrong := sorted(found["mismatched_keys"], key=str):
        names = [key if isinstance(key, str) else str(key[0]) for key in wrong]  # 4.5x leaves the shapes out
        shapes = "" if isinstance(wrong[0], str) else f" ({names[0]}: {list(wrong[0][1])}, not {list(wrong[0][2])})"
        raise ConfigError(
            f"{what} holds {_counted(names, 'weight')} in another shape than its config says{shapes}; use the config.json that "
            "belongs to the weights."
        )


def _counted(names: list[str], noun: str) -> str:
    return f"{noun} {names[0]}" if len(names) == 1 else f"{len(names)} {noun}s ({names[0]} the first)"


def refuse_irregular(what: str, name_or_path: str) -> None:
    """Refuse a model folder that holds what is no file, as a pipe.

    Raises:
        ConfigError: naming it.
    """
    folder = Path(name_or_path)
    found = irregular(folder) if folder.is_dir() else None
    if found is not None:
        raise ConfigError(f"{what}: {found} is not a regular file; copy the model again.")


def read_config(name_or_path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the config of a causal LM; errors as of `saying_why`."""
    refuse_irregular(f"model.name_or_path={name_or_path!r}", name_or_path)
    with saying_why(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def skeleton(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal LM on the meta device, without its weights, and hold the names and shapes in its files against it.

    What is not here yet (a model on the hub that is not in the cache) is compared when its weights are read.

    Raises:
        ConfigError, UnsupportedModelError: what `load_base` would raise over config and weights.
    """
    config = read_config(name_or_path, trust_remote_code)
    with saying_why(name_or_path), torch.device("meta"):
        empty: PreTrainedModel = causal_class(config).from_config(config, trust_remote_code=trust_remote_code)
    folder = model_folder(name_or_path)
    files = weight_files(folder) if folder is not None else []
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method", "bitsandbytes") if isinstance(quantised, dict) else None
    if files and (quantised is None or method == "bitsandbytes"):  # others keep weights under names of their own
        with saying_why(name_or_path):
            shapes = {name: shape for path in files for name, shape in tensor_shapes(path).items()}
            found = match_names(empty, shapes)
        if found is not None:
            if quantised is not None:  # packed weights have other shapes, and bring statistics along
                found |= {"mismatched_keys": set(), "unexpected_keys": set()}
            refuse_incomplete(f"model.name_or_path={name_or_path!r}", found)
    return empty


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that `from_pretrained` reads from a model folder: one, or those that the index names.

    Raises:
        ConfigError: when the index is broken.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{str(folder)!r} holds a broken {INDEX}; copy the model again.") from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a safetensors file, by name; no tensor is read."""
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
