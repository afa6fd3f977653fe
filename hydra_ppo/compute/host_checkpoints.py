"""What a layer's checkpoint keeps, kept in host memory.

Checkpointing leaves of each layer its input, B x T x H numbers: for a row of 32768 tokens through Llama-3.1-8B 8 GiB in bf16.
Here they lie in host memory from the end of the layer's forward pass until its recomputation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hydra_ppo.runtime.host_tensors import is_on_host, to_host


class _OnHost:
    """A tensor's copy in host memory, and the device that it came from."""

    def __init__(self, tensor: Tensor) -> None:
        # Why no copy is waited for: both go through the stream that is current on the device. Whatever is given the tensor's
        # memory next stands behind the first in that stream. Autograd runs a node's backward pass in the stream of its forward
        # pass, so that the second stands behind the first, and what reads its result behind that. The host never reads what it
        # holds. Pinned memory that is freed while a copy is under way is given out again only after it: torch's allocator of
        # pinned memory records an event for each copy. Streams of their own, which would hide the copies behind the layers'
        # work, would need events here.
        self.held = to_host(tensor, non_blocking=True)
        self.device = tensor.device

    def back(self) -> Tensor:
        """Return a new tensor on the device."""
        return torch.empty(self.held.shape, dtype=self.held.dtype, device=self.device).copy_(self.held, non_blocking=True)


def kept_on_host(hidden: Tensor) -> AbstractContextManager[None]:
    """Let what autograd saves of `hidden` inside the block be a copy in host memory; all else is saved as ever.

    Around a checkpointed layer that is the layer's input alone: what is saved inside of the layer, the checkpoint drops.
    Position embeddings and masks, which all layers share, and parameters are other tensors and stay where they are.

    Args:
        hidden: (B, T, H), the input of a layer.

    Memory: as much on the host as `hidden` takes; on the device nothing, once nobody else holds it. Each backward pass over the
    graph makes it anew there.
    """
    storage = hidden.untyped_storage()._cdata  # a number: it keeps nothing alive

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        return _OnHost(tensor) if tensor.untyped_storage()._cdata == storage and not is_on_host(tensor) else tensor

    def unpack(kept: Tensor | _OnHost) -> Tensor:
        return kept.back() if isinstance(kept, _OnHost) else kept

    return saved_tensors_hooks(pack, unpack)
