"""Folders whose linear layers were quantised when they were written: how they are held, and what they compute in."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.compat import VERSION, dtype_option, loads_quantised
from hydra_ppo.errors import ConfigError

logger = logging.getLogger("hydra_ppo")

BITSANDBYTES = "bitsandbytes"


def stored_quantization(config: PretrainedConfig) -> str | None:
    """Return how a config says that its weights are stored: int8, nf4, fp4, another library's name, or None for plain ones."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    method = values.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def check_stored(name_or_path: str, config: PretrainedConfig, asked: str | None, place: torch.device) -> None:
    """Say where a folder is held otherwise than asked for, and refuse one that cannot be read on a device.

    Raises:
        ConfigError: where this version of transformers cannot.
    """
    stored = stored_quantization(config)
    if asked is not None and asked != stored:
        logger.warning(
            "model.quantization=%s is not how %s is stored: its weights are %s and stay so; name the unquantised model for %s.",
            *(asked, name_or_path, stored, asked),
        )
    if stored in ("int8", "nf4", "fp4") and not loads_quantised(place):
        raise ConfigError(
            f"model.name_or_path={name_or_path!r} is stored as {stored}, which transformers=={VERSION} cannot read on a CPU; "
            "update it to 4.57 or later, or name the unquantised model with model.quantization."
        )


def compute_in(model: PreTrainedModel, dtype: torch.dtype, written: torch.dtype | None) -> None:
    """Let a model of bitsandbytes compute in a type, in place, as if the unquantised model had been loaded in it.

    `from_pretrained` takes from such a folder the types that it was written with, whatever it is asked for.

    Args:
        model: as it was just read.
        dtype: to compute in.
        written: the type that the folder was written in; None where it does not say.

    Memory: where the types differ, what is not quantised once in either type, tensor by tensor.
    """
    changed = False
    layer: Any  # of bitsandbytes
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and (state.dtype != dtype or getattr(layer, "compute_dtype", dtype) != dtype):
            state.dtype = layer.compute_dtype = dtype
            changed = True
    kept = _kept_in_fp32(model) if dtype != torch.float32 else ()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                continue  # quantised ones are of a class of their own, and may be stored in any type
            if parameter.dtype != dtype and not any(part in f"{prefix}.{name}".split(".") for part in kept):
                parameter.data = parameter.data.to(dtype)  # in place, so that tied ones stay tied
                changed = True
    for name, value in dtype_option(dtype).items():
        setattr(model.config, name, value)
    if changed and written is not None and written != dtype:
        logger.info(
            "%s was quantised in %s and computes in %s here, as model.dtype says",
            *(model.name_or_path, str(written).removeprefix("torch."), str(dtype).removeprefix("torch.")),
        )


def _kept_in_fp32(model: PreTrainedModel) -> tuple[str, ...]:
    """Return names of modules that a family keeps in fp32, whatever it is loaded in."""
    found = [getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    return tuple(str(part) for parts in found for part in parts)
