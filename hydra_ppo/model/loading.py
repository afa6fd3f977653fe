"""Brings a base into memory: device, compute type, attention kernel, quantisation."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.compat import (
    FLASH_IS_BUILT_IN,
    NAMES_WHAT_IS_MISSING,
    dtype_option,
    loads_quantised,
    mend_int8_layers,
    stored_dtype,
)
from hydra_ppo.compute.flash import fetch_from_kernels
from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.model.architecture import inspect_architecture
from hydra_ppo.model.arriving import Arrivals, See, Take
from hydra_ppo.model.prequantized import check_stored, compute_in
from hydra_ppo.model.quantized_embeddings import check_width, quantize_embeddings, rows_taker
from hydra_ppo.model.sharding import Whole, one_after_the_other, shard_layers
from hydra_ppo.model.whole import causal_class, first_line, load_whole, read_config, saying_why, skeleton

logger = logging.getLogger("hydra_ppo")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device; auto is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"model.device={device!r} is not a device; use auto, cpu, cuda or cuda:N.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={device!r} but no CUDA device is usable here; use auto or cpu.")
    return resolved


def resolve_dtype(dtype: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """Turn auto, fp32, bf16 or fp16 into a dtype; auto is what the checkpoint holds on a GPU and fp32 on a CPU."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"model.dtype={dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return stored if device.type == "cuda" and stored is not None else torch.float32


def resolve_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the attention kernel, and log the choice where there is one: on a GPU.

    Raises:
        ConfigError: when it is unknown, or flash-attention is asked for and cannot be used; the message says why.
    """
    if attention in ("sdpa", "eager"):
        return attention
    if attention not in ("auto", "flash_attention_2"):
        raise ConfigError(f"model.attention={attention!r} is unknown; choose auto, flash_attention_2, sdpa or eager.")
    obstacle = None
    missing = importlib.util.find_spec("flash_attn") is None
    if missing and device.type != "cuda":
        obstacle = "the package flash-attn is not installed"
    elif device.type != "cuda":
        obstacle = f"the device is {device.type}"
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"the compute type is {dtype}, not bf16 or fp16"
    elif FLASH_IS_BUILT_IN:
        obstacle = "transformers below 4.48 cannot leave it for sampling"
    elif missing and (reason := fetch_from_kernels()) is not None:
        obstacle = f"the package flash-attn is not installed, {reason}"
    if obstacle is None:
        chosen = "flash_attention_2"
    elif attention == "flash_attention_2":
        raise ConfigError(
            f"model.attention='flash_attention_2' but {obstacle}; remove the obstacle or use model.attention=auto."
        )
    else:
        chosen = "sdpa"
    if device.type == "cuda":  # elsewhere there is nothing to choose, nor to do about it
        through = " (through kernels)" if missing and obstacle is None else ""
        logger.info("attention=auto takes %s%s", chosen, f" ({obstacle})" if obstacle else through)
    return chosen


def _kernel_option(attention: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the argument of `from_pretrained` and `from_config` that says the attention kernel.

    Where it is chosen by us and not flash-attention it is left to the class: GPT-OSS has sinks and Gemma 2 caps, which SDPA
    cannot do.
    """
    chosen = resolve_attention(attention, device, dtype)
    return {} if attention == "auto" and chosen == "sdpa" else {"attn_implementation": chosen}


def load_base(
    name_or_path: str,
    *,
    quantization: str | None,
    attention: str,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    quantized_embeddings: str | None = None,
    take: Take | None = None,
    see: See | None = None,
    shard: bool = False,
) -> PreTrainedModel:
    """Load a causal LM from a local folder or the hub, from safetensors only.

    Args:
        quantized_embeddings: int8 or nf4: how input embedding and output head are held; None is in the compute type.
        take: is offered input embedding and output head, each on the host, before they are put on the device; where they are
            quantised, that is what takes them.
        see: is told the model, and the name of each weight that has come (transformers from 5 on).
        shard: share the decoder layers out over the processes that have met, each as soon as it is whole.

    Memory: the base once, in the type that it is held in, and one weight of a layer before it is quantised (on a CPU with
    transformers below 4.57 first the unquantised base). Shared out: this process's part, and one whole layer; with transformers
    below 5 first the whole base.

    Raises:
        ConfigError: when it cannot be found or read, or its files lack weights; the message names it.
        UnsupportedModelError: when its class cannot use the attention kernel.
    """
    place = resolve_device(device)
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.name_or_path={name_or_path!r} is an adapter; name its base there, and this folder in model.adapter."
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.name_or_path={name_or_path!r} holds no config.json; name a folder with config.json and safetensors "
            "weights, or a model on the hub."
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    what = f"model.name_or_path={name_or_path!r}"
    config = read_config(name_or_path, trust_remote_code)
    compute = resolve_dtype(dtype, place, stored_dtype(config))
    prequantized = getattr(config, "quantization_config", None) is not None
    if prequantized or not NAMES_WHAT_IS_MISSING:  # 5.x too breaks off over what packed files lack
        skeleton(name_or_path, trust_remote_code=trust_remote_code)
    if prequantized:
        check_stored(name_or_path, config, quantization, place)
        quantization = None
    wanted = quantization_config(quantization, compute) if quantization is not None else None
    if wanted is not None and loads_quantised(place):
        options["quantization_config"] = wanted
    if quantized_embeddings is not None:
        take = rows_taker(quantized_embeddings, place)
    empty = skeleton(name_or_path, trust_remote_code=trust_remote_code) if take is not None else None
    if empty is not None and quantized_embeddings is not None:
        check_width(empty, quantized_embeddings)  # before a weight is read
    arrivals = Arrivals(empty, place, compute, take, Whole().see if shard else see)
    with saying_why(name_or_path), one_after_the_other() if shard else nullcontext(), arrivals.while_loading():
        model = load_whole(
            causal_class(config),
            name_or_path,
            what,
            **dtype_option(compute),
            **_kernel_option(attention, place, compute),
            device_map={"": str(place) if place.index is not None or place.type == "cpu" else torch.cuda.current_device()},
            **options,
        )
        if quantization is not None and "quantization_config" not in options:
            quantize_linears(model, quantization, compute)
    if prequantized and quantization_of(model) in ("int8", "nf4", "fp4"):
        compute_in(model, compute, stored_dtype(config))
    arrivals.after(model)
    if shard:
        shard_layers(model)
    if quantized_embeddings is not None:
        quantize_embeddings(model, quantized_embeddings, lambda weight, kind: arrivals.made_of(weight))
    return model


def base_from_config(
    config: PretrainedConfig,
    *,
    quantization: str | None,
    attention: str,
    dtype: str,
    device: str,
    quantized_embeddings: str | None = None,
    shard: bool = False,
) -> PreTrainedModel:
    """Build a causal LM with random weights (of torch's global generator), quantised where asked."""
    config = deepcopy(config)  # into which transformers writes the type
    place = resolve_device(device)
    compute = resolve_dtype(dtype, place, None)
    kernel = _kernel_option(attention, place, compute)
    try:
        model = causal_class(config).from_config(config, **dtype_option(compute), **kernel).to(place)
    except ValueError as error:
        raise UnsupportedModelError(
            f"config={type(config).__name__} is not of a causal LM that can be built: {first_line(error)[:160]}; "
            "use one of the supported families."
        ) from error
    if quantization is not None:
        quantize_linears(model, quantization, compute)
    if quantized_embeddings is not None:
        quantize_embeddings(model, quantized_embeddings)
    if shard:
        shard_layers(model)
    return model


def quantize_linears(model: PreTrainedModel, quantization: str, compute: torch.dtype) -> None:
    """Replace the linear layers inside the decoder layers by quantised ones, in place.

    What `from_pretrained` does while it loads, for weights that are in memory already.
    """
    from transformers.pytorch_utils import Conv1D

    for layer in inspect_architecture(model).layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear and not isinstance(linear, Conv1D):
                continue
            weight = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
            has_bias = linear.bias is not None
            new = _int8(weight, has_bias) if quantization == "int8" else _four_bit(weight, has_bias, quantization, compute)
            if has_bias:
                new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            layer.set_submodule(name, new.to(weight.device))
    mend_int8_layers(model)
    setattr(model, "is_loaded_in_8bit" if quantization == "int8" else "is_loaded_in_4bit", True)


def quantization_of(model: nn.Module) -> str | None:
    """Return how the linear layers of a base are held: int8, nf4, fp4, another library's name, or None for plain weights."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            return "int8"
        for held in (getattr(module, "weight", None), getattr(module, "quant_state", None)):  # of a 4-bit parameter
            if (kind := getattr(held, "quant_type", None)) is not None:
                return str(kind)
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _int8(weight: Tensor, has_bias: bool) -> nn.Module:
    from bitsandbytes import nn as bnb

    out_features, in_features = weight.shape
    layer = bnb.Linear8bitLt(in_features, out_features, has_bias, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return layer


def _four_bit(weight: Tensor, has_bias: bool, quant_type: str, compute: torch.dtype) -> nn.Module:
    from bitsandbytes import nn as bnb

    out_features, in_features = weight.shape
    layer = bnb.Linear4bit(in_features, out_features, has_bias, compute, quant_type=quant_type)
    layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type=quant_type, compress_statistics=True, module=layer)
    return layer


def quantization_config(quantization: str, compute: torch.dtype, keep: Sequence[str] = ()) -> Any:
    """Return what tells `from_pretrained` to quantise linear layers while it loads them.

    Args:
        quantization: int8, nf4 or fp4.
        compute: the type that 4-bit layers compute in.
        keep: names of modules to leave as they are; without any it is transformers' choice, the output head.
    """
    from transformers import BitsAndBytesConfig

    skipped = list(keep) or None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if quantization in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=skipped,  # not of int8 alone, for all its name
        )
    raise ConfigError(f"model.quantization={quantization!r} is unknown; choose int8, nf4, fp4 or null.")
