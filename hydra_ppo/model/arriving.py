"""Weights on their way from the files into a model: seen one by one, and two of them given to whoever holds them otherwise.

The input embedding and the output head may be as large as all that is quantised. Who quantises them too takes them here, out of
the host's memory (mapped files, where they are stored in the type that is computed in), so that they never lie unquantised on
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Take = Callable[[str, Tensor], Any]
"""Is given the name and the (V, H) weight of an embedding or a head, in the compute type; returns what it made of it, or None
where it leaves it."""
See = Callable[[nn.Module, str], None]
"""Is told the model, and the name of each of its weights as it has come."""

STAND_IN = 0.1
"""What is in a model for all of a weight that was taken: no 0 or 1, so that what scales it can be told by what comes out."""


class Arrivals:
    """What became of the weights that are offered to `take`.

    Args:
        empty: the model on the meta device, which says what they are called; None where nothing is taken.
        device: of the model.
        dtype: that it computes in.
        take: takes them; None lets all go into the model.
        see: is told of every weight.

    Attributes:
        made: by name, what was made of the weights that were taken. In the model a number stands for each, in its shape,
            without its memory.
    """

    def __init__(
        self,
        empty: PreTrainedModel | None,
        device: torch.device,
        dtype: torch.dtype,
        take: Take | None = None,
        see: See | None = None,
    ) -> None:
        self.device, self.dtype, self.take, self.see = device, dtype, take, see
        self.shapes = {} if empty is None else _vocabulary_weights(empty)
        self.made: dict[str, Any] = {}
        self._stand_ins: dict[int, str] = {}
        self._seen = False

    @contextmanager
    def while_loading(self) -> Iterator[None]:
        """Watch `from_pretrained` inside the block, where its version (5.0 and on) has a place for that."""
        if self.take is None and self.see is None:
            yield
            return
        try:
            loading: Any = import_module("transformers.core_model_loading")
            device_of, put = loading.get_device, loading.set_param_for_module
        except (ImportError, AttributeError):
            yield
            return

        def on_host_first(device_map: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            return torch.device("cpu") if name in self.shapes else device_of(device_map, name, *args, **kwargs)

        def offered(model: Any, name: str, value: Tensor, *args: Any, **kwargs: Any) -> None:
            self._seen = True
            if self.shapes.get(name) == value.shape:  # of any other the loading ends in an error
                value = self._offer(name, value)
            put(model, name, value, *args, **kwargs)
            if self.see is not None:
                self.see(model, name)

        with patch.object(loading, "get_device", on_host_first), patch.object(loading, "set_param_for_module", offered):
            yield

    def after(self, model: PreTrainedModel) -> None:
        """Offer what no version before 5 offers while it loads; the device has held it in between."""
        if self._seen or self.take is None:
            return
        for module in _vocabulary_modules(model):
            name = next(name for name, found in model.named_modules() if found is module)
            weight = module.weight
            if weight.stride() == (0, 0):  # tied to what was taken
                continue
            stand_in = nn.Parameter(self._offer(f"{name}.weight", weight.detach()), requires_grad=weight.requires_grad)
            for other in _vocabulary_modules(model):
                if other.weight is weight:
                    other.weight = stand_in

    def _offer(self, name: str, value: Tensor) -> Tensor:
        assert self.take is not None
        value = value.to(self.dtype)  # a folder that is stored quantised comes in the type that it was written in
        made = self.take(name, value)
        if made is None:
            return value.to(self.device)
        self.made[name] = made
        number = torch.full((), STAND_IN, dtype=value.dtype, device=self.device)
        self._stand_ins[number.data_ptr()] = name
        return number.expand(value.shape)

    def made_of(self, weight: Tensor) -> Any:
        """Return what was made of the weight that this one in the model stands for; None where it is the weight itself."""
        name = self._stand_ins.get(weight.data_ptr()) if weight.stride() == (0, 0) else None
        return None if name is None else self.made[name]


def _vocabulary_modules(model: PreTrainedModel) -> list[Any]:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in found if isinstance(getattr(module, "weight", None), Tensor)]


def _vocabulary_weights(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shapes of the weights of input embedding and output head, by name; of tied ones under both."""
    modules = {id(module) for module in _vocabulary_modules(model)}
    named = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight": module.weight.shape for name, module in named if id(module) in modules}
