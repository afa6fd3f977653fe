"""What differs between versions of transformers (4.46 to 5.x), PEFT (0.13 and on) and accelerate (1.0 and on).

Each difference is one function here, and the rest of the library asks no version. Where a difference shows in the model
itself, the model is asked; a version number is compared only where nothing else tells.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime, tzinfo
from typing import Any, Self

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import chat_template_utils

from hydra_ppo.errors import UnsupportedModelError

VERSION = Version(Version(transformers.__version__).base_version)

MASKS_BY_LAYER_TYPE = Version("4.53") <= VERSION
"""Since then `transformers.masking_utils` makes masks: backbones take boolean 4D ones, and a dictionary by layer type.
Before, every model had code of its own, which takes 2D masks of ones and zeros or additive 4D ones."""

NAMES_WHAT_IS_MISSING = Version("5") <= VERSION
"""Before, `from_pretrained` breaks off over weights that are missing wherever the model has a device of its own."""

FLASH_IS_BUILT_IN = Version("4.48") > VERSION
"""Before, a model's layers were of a class for each kernel, so that no setting switches flash-attention off again."""


# -- loading -------------------------------------------------------------------------------------------------------------


def dtype_option(dtype: torch.dtype | str) -> dict[str, torch.dtype | str]:
    """Return the argument of `from_pretrained` and `from_config` that says the compute type; `auto` is the stored one."""
    # `torch_dtype` became `dtype` in 4.56, which still takes the old name; older ones hand an unknown name to the model.
    return {"dtype" if Version("4.56") <= VERSION else "torch_dtype": dtype}


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the type that a checkpoint's weights are stored in, where its config says."""
    # The attribute was `torch_dtype` before 4.56.
    found = getattr(config, "dtype" if Version("4.56") <= VERSION else "torch_dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


def match_names(empty: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Hold names and shapes of stored weights against a model, as `from_pretrained` does when it reads them.

    Args:
        empty: the model, on the meta device.
        shapes: of the tensors in its files, by name.

    Returns:
        What `from_pretrained` returns with `output_loading_info=True`; None where it cannot be known before weights are read.
    """
    if not NAMES_WHAT_IS_MISSING:
        return _match_names(empty, shapes)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
    config = deepcopy(empty.config)
    if hasattr(config, "quantization_config"):  # packed weights bear the names of plain ones
        del config.quantization_config
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # whoever asked says what was found
    logging.disable_progress_bar()
    try:
        found: Any = type(empty).from_pretrained(None, config=config, state_dict=tensors, **options)
        return found[1]
    except (TypeError, AttributeError, NotImplementedError):  # a class of its own, which does not take this
        return None
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _match_names(empty: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Do by hand what 4.x does while it reads weights: it puts none together from several, and adds a backbone's prefix."""
    if getattr(empty, "_checkpoint_conversion_mapping", None):
        return None
    needed = empty.state_dict(keep_vars=True)  # without buffers that are computed
    prefix = f"{empty.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in shapes)
    found = {}
    for name, shape in shapes.items():
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        found[prefix + new if bare and prefix + new in needed else new] = shape
    held = {id(tensor) for name, tensor in needed.items() if name in found}  # with what is tied to them
    ignored = getattr(empty, "_keys_to_ignore_on_load_missing", None) or []
    missing = {name for name, tensor in needed.items() if id(tensor) not in held}
    return {
        "missing_keys": {name for name in missing if not any(re.search(pattern, name) for pattern in ignored)},
        "unexpected_keys": found.keys() - needed.keys(),
        "mismatched_keys": {
            (name, shape, tuple(needed[name].shape))
            for name, shape in found.items()
            if name in needed and tuple(needed[name].shape) != shape
        },
    }


def loads_quantised(device: torch.device) -> bool:
    """Return whether `from_pretrained` can quantise weights for that device while it loads them."""
    # On a CPU 4.46 and 4.52 ask for Intel's extension of torch, which bitsandbytes no longer needs; 4.57 does not.
    return device.type != "cpu" or Version("4.57") <= VERSION


def dequantised(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a quantised model with plain weights of the given type, in place where it can be."""
    # 5.x takes the type; before, weights come in the type of the rest of the model.
    if "dtype" in inspect.signature(model.dequantize).parameters:
        return model.dequantize(dtype=dtype)
    return nn.Module.to(model.dequantize(), dtype)


def mend_int8_layers(model: nn.Module) -> None:
    """Let PEFT adapt the 8-bit layers of `model`, in place."""
    # PEFT 0.13 asks each for an option that bitsandbytes has dropped since; those of 0.15 and on do not.
    for module in model.modules():
        state = getattr(module, "state", None) if type(module).__name__ == "Linear8bitLt" else None
        if state is not None and not hasattr(state, "memory_efficient_backward"):
            state.memory_efficient_backward = False


# -- parts of a model ----------------------------------------------------------------------------------------------------


def backbone_of(causal_lm: PreTrainedModel) -> nn.Module | None:
    """Return the part of a causal LM that computes final hidden states, None where there is none."""
    # Gemma 3's text model says `language_model` before 5.0, Llama 4's does today, where they have no such attribute.
    decoder = causal_lm.get_decoder() if callable(getattr(causal_lm, "get_decoder", None)) else None
    for found in (getattr(causal_lm, causal_lm.base_model_prefix, None), decoder, getattr(causal_lm, "model", None)):
        if isinstance(found, nn.Module) and found is not causal_lm:
            return found
    return None


def layer_types(config: PretrainedConfig, layers: nn.ModuleList | Sequence[nn.Module]) -> list[str]:
    """Return the kind of attention of each decoder layer, as `layer_types` in configs of today names it."""
    if MASKS_BY_LAYER_TYPE:
        types = getattr(config, "layer_types", None)
    else:  # 4.46 to 4.52: Gemma 2 and 3, Cohere 2 and Llama 4 decide by a rule of their own, and a config cannot say
        types = [_layer_type(layer) for layer in layers] if any(hasattr(layer, "is_sliding") for layer in layers) else None
        if any(getattr(module, "use_chunked_attention", False) for layer in layers for module in layer.modules()):
            types = ["chunked_attention"]
    if types is None:
        window = getattr(config, "sliding_window", None)
        if not MASKS_BY_LAYER_TYPE and not getattr(config, "use_sliding_window", True):
            window = None  # Qwen of 4.52 leaves it in the config when it is not used
        types = ["sliding_attention" if window is not None else "full_attention"] * len(layers)
    return list(types)


def _layer_type(layer: nn.Module) -> str:
    return "sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention"


def attention_is_built_in(model: nn.Module) -> bool:
    """Return whether flash-attention is in the classes of the model's layers; see `FLASH_IS_BUILT_IN`."""
    # Some models kept such classes, LlamaFlashAttention2 and the like, beyond 4.48.
    return any(type(module).__name__.endswith("FlashAttention2") for module in model.modules())


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> bool:
    """Let models attend with `function` where their config names it; return False on versions where that cannot be."""
    # Before 5 masks are made for functions of other names too, or the models do not hand their arguments on.
    if Version("5") > VERSION:
        return False
    transformers.AttentionInterface.register(name, function)
    return True


def experts_of(model: PreTrainedModel, config: Any, targets: Iterable[str]) -> set[str]:
    """Return those targets of a LoRA config that PEFT would turn into parameters of fused experts.

    Since transformers 5 the experts of a layer are one tensor, and PEFT puts adapters of older versions on that, whatever else
    bears the name: the MLP of a first layer without experts, too. `layers_to_transform` does not bind it.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    found = set()
    for target in targets:
        asked = deepcopy(config)
        asked.target_modules = {target}
        try:
            convert_peft_config_for_transformers(asked, model=model, conversions=None)
        except ValueError:  # one part of what is fused, without the other
            found.add(target)
        else:
            if getattr(asked, "target_parameters", None):
                found.add(target)
    return found


def refused_targets(config: Any, model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return the names that PEFT will not adapt in this model: a state-space layer whose kernel reads the weight itself."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    except ImportError:
        return set()
    found = set()
    for name in names:
        try:
            check(config, model, name.rsplit(".", 1)[-1])
        except ValueError:
            found.add(name)
    return found


def model_cache(config: PretrainedConfig) -> Any:
    """Return an empty cache with layers of the kinds that a model has: attention, windows, recurrent states.

    Raises:
        UnsupportedModelError: on versions that know one kind only.
    """
    if "config" not in inspect.signature(transformers.DynamicCache.__init__).parameters:
        raise UnsupportedModelError("model needs a cache of its own, which transformers below 4.56 does not make; update it.")
    return transformers.DynamicCache(config=config)


# -- passes --------------------------------------------------------------------------------------------------------------


def last_hidden_state(backbone: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """Run a backbone and return (B, T, H) final hidden states; a cache among the options is filled in place."""
    cache = options.get("past_key_values")
    if cache is None and options.get("attention_mask") is None and options.get("position_ids") is None:
        options |= _no_mask(input_ids)
    if cache is not None and _takes_tuples(backbone):
        return _with_tuples(backbone, input_ids, cache, options)
    if cache is not None or "use_cache" in inspect.signature(backbone.forward).parameters or _takes_any(backbone):
        options["use_cache"] = cache is not None
    return backbone(input_ids=input_ids, **options).last_hidden_state


def _takes_any(module: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


class _AtHead(Exception):
    """Carries what the output head was given out of a pass that need go no further."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def states_at_head(causal_lm: PreTrainedModel, head: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """Run a causal LM up to its output head and return (B, T, H), what the head is given; logits are not computed.

    Raises:
        LookupError: when the head is not called.
    """

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _AtHead(args[0])

    handle = head.register_forward_pre_hook(stop)
    try:
        causal_lm(input_ids=input_ids, use_cache=options.get("past_key_values") is not None, **options)
    except _AtHead as reached:
        return reached.states
    finally:
        handle.remove()
    raise LookupError(f"{type(causal_lm).__name__} does not call its output head")


def _no_mask(input_ids: Tensor) -> dict[str, Tensor]:
    """Return what keeps transformers from building a mask (B, 1, T, T) where plain causal attention needs none."""
    # Without any, 4.53 to 5.x look for packed sequences and build one whether they find some or not; 5.17 does not.
    if Version("4.53") <= VERSION < Version("5.17"):
        return {"attention_mask": torch.ones_like(input_ids)}
    return {}


def _takes_tuples(backbone: nn.Module) -> bool:
    # GPT-2 and OPT of 4.46 take and return tuples of tensors; those of 4.52 take caches, and later the flag is gone.
    return Version("4.53") > VERSION and not getattr(backbone, "_supports_cache_class", True)


def _with_tuples(backbone: nn.Module, input_ids: Tensor, cache: Any, options: dict[str, Any]) -> Tensor:
    # `cache` is a DynamicCache of these versions, which has other attributes than that of today.
    past = cache.to_legacy_cache() if cache.get_seq_length() else None
    out = backbone(input_ids=input_ids, use_cache=True, **options | {"past_key_values": past})
    cache.key_cache[:] = [keys for keys, _ in out.past_key_values]
    cache.value_cache[:] = [values for _, values in out.past_key_values]
    return out.last_hidden_state


def check_positions(backbone: nn.Module) -> None:
    """Check that a backbone can be told the position of a token, which decoding with holes in the cache needs.

    Raises:
        UnsupportedModelError: when it cannot.
    """
    # Every supported family can since 4.46; of others (BLOOM, MPT) some cannot, in any version.
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise UnsupportedModelError(
            f"model={type(backbone).__name__} takes no position_ids, without which it cannot sample for several prompts at "
            "once; use one of the supported families."
        )


@contextmanager
def decoding_mask(
    layers: Iterable[nn.Module], types: Sequence[str], seen: Mapping[str, Tensor], dtype: torch.dtype, additive: bool = False
) -> Iterator[Any]:
    """Give the attention mask for one query per row, in the form that the backbone takes inside the block.

    Args:
        layers: the decoder layers.
        types: what `layer_types` returned for them.
        seen: by layer type, (B, S), whether the query sees each key in the cache.
        dtype: the compute type.
        additive: whether the attention adds the mask to its scores, instead of asking it.
    """
    if MASKS_BY_LAYER_TYPE:
        masks = {kind: keys[:, None, None, :] for kind, keys in seen.items()}  # (B, 1, 1, S)
        if additive:
            lowest = torch.finfo(dtype).min
            masks = {kind: torch.zeros_like(keys, dtype=dtype).masked_fill_(~keys, lowest) for kind, keys in masks.items()}
        yield masks if len(masks) > 1 else next(iter(masks.values()))
    elif set(seen) == {"full_attention"}:
        yield seen["full_attention"].long()  # (B, S): all that GPT-2 and OPT of 4.46 understand
    else:
        # Windows count positions, not columns, of which some are holes; so the mask is made here. Some models cast it (a
        # boolean one would become ones and zeros), so it is additive. Layers with windows of their own (Gemma, Cohere 2) cut
        # it by columns again: past them, their attention gets its own kind.
        masks = {}
        for kind, keys in seen.items():
            blocked = torch.zeros_like(keys, dtype=dtype).masked_fill_(~keys, torch.finfo(dtype).min)
            masks[kind] = blocked[:, None, None, :]  # (B, 1, 1, S)
        handles = [
            layer.get_submodule("self_attn").register_forward_pre_hook(_put_mask(masks[kind]), with_kwargs=True)
            for layer, kind in zip(layers, types, strict=True)
            if hasattr(layer, "is_sliding")
        ]
        try:
            yield next(iter(masks.values()))
        finally:
            for handle in handles:
                handle.remove()


def _put_mask(mask: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": mask}

    return hook


# -- beside the model ----------------------------------------------------------------------------------------------------


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those outputs of a tokenizer that `model` takes."""
    # Tokenizers of 4.46 and 4.52 return token types for models that know none, such as Llama.
    known = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in known}


def start_tracker(tracker: Any) -> None:
    """Start one of accelerate's trackers."""
    # Those of 1.7 and before have started when they are made.
    if hasattr(tracker, "start"):
        tracker.start()


@contextmanager
def template_clock(moment: datetime) -> Iterator[None]:
    """Let chat templates see `moment` as the time inside the block.

    All versions make the function that templates ask, `strftime_now`, themselves, and newer ones take none from outside.
    """

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(moment.timestamp(), tz)

    module: Any = chat_template_utils
    before, module.datetime = module.datetime, Stopped
    try:
        yield
    finally:
        module.datetime = before
