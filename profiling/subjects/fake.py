"""Models whose tensors have shapes but no memory, so that the real code can run on any of them, anywhere.

torch refuses fake CUDA tensors where it has no CUDA, so these say they are on the CPU. They take part in everything that
the trainer does; what it reads back to the host comes as zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import PretrainedConfig, PreTrainedModel

from hydra_ppo.algorithms import advantages
from hydra_ppo.compat import VERSION
from hydra_ppo.compute import logprobs
from hydra_ppo.compute.kv_cache import last_full
from hydra_ppo.compute.quantized_rows import BLOCK_BYTES, QuantizedRows, RowsKind
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model.architecture import inspect_architecture, is_linear
from hydra_ppo.model.quantized_embeddings import quantize_embeddings
from hydra_ppo.model.sharding import shard_layer
from hydra_ppo.model.whole import causal_class
from hydra_ppo.rollout.decoder import Decoder
from hydra_ppo.runtime.host_tensors import empty_on_host
from hydra_ppo.training import eight_bit, ppo_advantages, practice

MOST_COLUMNS = 8
"""Of advantages in a simulation."""


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Any:
    if not shape:
        return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
    return [_zeros(shape[1:], dtype) for _ in range(shape[0])]


HOST_READS: dict[str, Any] = {
    "item": lambda tensor: _zeros((), tensor.dtype),
    "tolist": lambda tensor: _zeros(tensor.shape, tensor.dtype),
    "__bool__": lambda tensor: False,
    "__int__": lambda tensor: 0,
    "__float__": lambda tensor: 0.0,
}
"""What a fake tensor answers when its values are read: zeros of the right shape."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor that is created inside the block a fake one.

    A table that bitsandbytes keeps for the whole process is filled first, so that no fake one stays in it.
    """
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes.functional as bnb

        bnb.quantize_blockwise(torch.zeros(256))
    with ExitStack() as stack:
        # `nn.Module.to` cannot move fake parameters, not even to where they are, and PEFT calls it on every new adapter. All
        # tensors are on one device here, and adapters are made in fp32, as they stay.
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *args, **kwargs: module))
        # transformers looks into position ids for packed sequences, which it cannot in fake ones; it then builds a mask of
        # T x T and expands the key-value heads. There are no packed sequences here.
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda *args, **kwargs: None))
        # bitsandbytes' optimizer runs as it is: its kernels have fakes, and allocate nothing on a GPU. Fake tensors stand for
        # a GPU's, whatever device they name, and pages for what the host can always take.
        check = eight_bit.check_available
        stack.enter_context(patch.object(eight_bit, "check_available", lambda name, device=None: check(name)))
        stack.enter_context(patch.object(eight_bit, "pages", _pages))
        for name, answer in HOST_READS.items():
            stack.enter_context(patch.object(FakeTensor, name, answer, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # bitsandbytes' tables: 1 KiB of real tensors
        yield


def _pages(make: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros in host memory, of the shape of `like`."""
    return empty_on_host(torch.empty((), dtype=dtype).expand(like.shape)).zero_()


@contextmanager
def no_repetition() -> Iterator[None]:
    """Leave out passes that can add no new peak, for rows that all have one length and weights without values.

    Of the micro-batches of a pass the first is run, of the minibatches of an update the first. Who uses this has to have the
    gradients there that a later micro-batch would find; where a minibatch is a single micro-batch, that counts gradients a
    little too early. Of the blocks in which log-probs go through the vocabulary two are run, of their groups of rows too; the
    columns of advantages, which are found one after the other, are taken to be few and long.
    """
    split, minibatches, cut, gae = Experience.split, Experience.minibatches, logprobs._cut, advantages.gae

    def one_group(self: Experience, *args: Any, **kwargs: Any) -> list[list[int]]:
        return split(self, *args, **kwargs)[:1]

    def one_minibatch(self: Experience, *args: Any, **kwargs: Any) -> Iterator[Experience]:
        yield next(minibatches(self, *args, **kwargs))

    def few_blocks(*args: Any, **kwargs: Any) -> tuple[list[slice], ...]:
        return tuple(pieces[:2] for pieces in cut(*args, **kwargs))  # the last are no larger

    def later_gradients(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def few_columns(rewards: Tensor, values: Tensor, mask: Tensor, *args: Any) -> tuple[Tensor, ...]:
        columns = max(count for count in range(1, MOST_COLUMNS + 1) if rewards.shape[1] % count == 0)
        found = gae(*(tensor.reshape(-1, columns) for tensor in (rewards, values, mask)), *args)
        return tuple(tensor.view(rewards.shape) for tensor in found)

    with (
        patch.object(Experience, "split", one_group),
        patch.object(Experience, "minibatches", one_minibatch),
        patch.object(logprobs, "_cut", few_blocks),
        patch.object(practice, "forget_gradients", later_gradients),
        patch.object(advantages, "gae", few_columns),
        patch.object(ppo_advantages, "gae", few_columns),
    ):
        yield


def fake_base(
    config: PretrainedConfig,
    quantization: str | None,
    dtype: torch.dtype,
    quantized_embeddings: str | None = None,
    shard: bool = False,
) -> PreTrainedModel:
    """Build a causal LM of fake tensors as `from_pretrained` loads one: each weight is quantised as it arrives.

    Must be called within `fake_tensors`. A base that is shared out gives each layer away as soon as it is whole.

    Raises:
        ConfigError: on a transformers whose masks and caches need real numbers.
    """
    if Version("5") > VERSION:
        raise ConfigError(
            f"transformers=={VERSION} cannot be simulated, its masks and caches read numbers that fake tensors lack; profile "
            "in an environment with transformers>=5.17."
        )
    model = meta_model(config, dtype)
    if quantized_embeddings is not None:
        quantize_embeddings(model, quantized_embeddings, _quantized_rows)
    if quantization is not None:
        layers = inspect_architecture(model).layers
        _materialise(model, leave={part for part in layers.modules() if is_linear(part)})  # by name they come before, mostly
        for layer in layers:
            for name in [name for name, part in layer.named_modules() if is_linear(part)]:
                _quantise(layer, name, quantization, dtype)
            if shard:
                shard_layer(layer)
        setattr(model, "is_loaded_in_8bit" if quantization == "int8" else "is_loaded_in_4bit", True)
    for layer in inspect_architecture(model).layers if shard and quantization is None else []:
        _materialise(layer)
        shard_layer(layer)
    _materialise(model)
    return model


def _quantized_rows(weight: Tensor, kind: RowsKind) -> QuantizedRows:
    """Quantise a weight that comes from a file, a block of rows at a time."""
    rows = QuantizedRows(kind, (weight.shape[0], weight.shape[1]), weight.dtype, torch.device("cpu"))
    for block in rows.blocks(BLOCK_BYTES):
        rows.put(block, torch.empty(block.stop - block.start, weight.shape[1], dtype=weight.dtype))
    return rows


def _quantise(layer: nn.Module, name: str, quantization: str, dtype: torch.dtype) -> None:
    """Replace one linear layer, whose weight is gone when this returns."""
    linear = layer.get_submodule(name)
    _materialise(linear)
    layer.set_submodule(name, _quantised(linear, quantization, dtype))


def _materialise(module: nn.Module, leave: Collection[nn.Module] = ()) -> None:
    """Give what is on the meta device storage of its own, in place, tied parameters the same; all but some modules.

    `nn.Module.to_empty` cannot with fake tensors.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        if part in leave:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                part._parameters[name] = made[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal LM on the meta device."""
    with torch.device("meta"):
        return causal_class(config).from_config(config, dtype=dtype, attn_implementation="sdpa")


def _quantised(linear: nn.Module, quantization: str, compute: torch.dtype) -> nn.Module:
    """Return a quantised layer of fake tensors."""
    import bitsandbytes as bnb

    weight = linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.T.contiguous()
    out_features, in_features = weight.shape
    with unset_fake_temporarily():  # a shell: bitsandbytes' parameters cannot be made of fake tensors
        if quantization == "int8":
            new: nn.Module = bnb.nn.Linear8bitLt(1, 1, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            new = bnb.nn.Linear4bit(1, 1, False, compute, quant_type=quantization)
    new.in_features, new.out_features = in_features, out_features
    if quantization == "int8":
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        parameter = nn.Parameter(values, requires_grad=False)
        parameter.CB, parameter.SCB, parameter.has_fp16_weights = parameter.data, scales, False
    else:
        values, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=quantization)
        parameter = nn.Parameter(values, requires_grad=False)
        parameter.quant_state, parameter.quant_type, parameter.compress_statistics = state, quantization, True
        parameter.bnb_quantized, parameter.blocksize = True, 64
    new.weight = parameter
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return new


class LeapingDecoder(Decoder):
    """Decodes only the last step before a row ends and the last one before it in which the cache is made anew; the cache is
    filled with columns of zeros up to there.

    For given lengths. Cache and temporaries are of the sizes that a step at that place has.
    """

    def _advance(self, token: Tensor, step: int, given: Sequence[int] | None) -> int:
        assert given is not None
        leap = min(given[row] for row in self.rows) - 2 - step  # the next token to be sampled is the last of its row
        columns = self.cache.get_seq_length()
        if (full := last_full(columns + leap)) >= columns:
            leap = full - columns
        if leap > 0:
            self.cache.leap(leap)
            self.positions = self.positions + leap
        return super()._advance(token, step + max(leap, 0), given)
