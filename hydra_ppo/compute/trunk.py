"""The decoder layers below all adapters: they compute the same for every role and PPO epoch, so once is enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hydra_ppo.compute.packing import Packing


class Trunk:
    """Takes the hidden states that enter the first layer above the trunk, or puts them there and leaves the trunk out.

    The backbone still embeds its tokens and makes positions and masks, as each family does in its own way; only what is in
    between is not run.

    Args:
        layers: all decoder layers of the base.
        count: how many of them are the trunk, at least 1 and fewer than all.
    """

    def __init__(self, layers: Sequence[nn.Module], count: int) -> None:
        self.count = count
        self._given: Tensor | None = None
        self._taken: list[Tensor] | None = None
        self._packing: Packing | None = None
        for layer in layers[:count]:
            layer.forward = SkippableForward(self, layer.forward)
        layers[count].register_forward_pre_hook(self._enter, with_kwargs=True)

    @property
    def given(self) -> bool:
        """Whether the trunk is left out at the moment."""
        return self._given is not None

    @property
    def idle(self) -> bool:
        """Whether the layers run as if there were no trunk: none is left out, and what leaves it is not collected."""
        return self._given is None and self._taken is None

    @contextmanager
    def take(self) -> Iterator[list[Tensor]]:
        """Collect what leaves the trunk inside the block, (B, T, H) a pass, without a graph."""
        before, self._taken = self._taken, []
        try:
            yield self._taken
        finally:
            self._taken = before

    @contextmanager
    def put(self, states: Tensor | None, packing: Packing | None = None) -> Iterator[None]:
        """Use `states` (B, T, H) inside the block in place of running the trunk; None runs it.

        With a `packing` the passes of the block are packed; what is given and taken is not.
        """
        before = self._given, self._packing
        self._given = states if states is None or packing is None else packing.pack(states)
        self._packing = packing
        try:
            yield
        finally:
            self._given, self._packing = before

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A hook, not a wrapped forward: it acts before checkpointing, which keeps the layer's input for the second pass.
        name = "hidden_states"
        hidden = args[0] if args else kwargs[name]
        if self._taken is not None:
            taken = hidden.detach()
            self._taken.append(taken if self._packing is None else self._packing.unpack(taken))
        if self._given is None:
            return None
        return ((self._given, *args[1:]), kwargs) if args else (args, kwargs | {name: self._given})


class SkippableForward:
    """The forward pass of one layer of the trunk."""

    def __init__(self, trunk: Trunk, inner: Any) -> None:
        self.trunk = trunk
        self.inner = inner
        self.extras: tuple[None, ...] | None = None  # beside the hidden states, where a layer returns a tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trunk.given:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if self.extras is None else (hidden, *self.extras)
        found = self.inner(*args, **kwargs)
        if isinstance(found, tuple):
            self.extras = (None,) * (len(found) - 1)
        return found
