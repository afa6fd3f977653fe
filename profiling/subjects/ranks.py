"""One process that takes itself for one of several, so that a simulation needs no others.

torch's fake process group answers every collective at once, with whatever is in the buffers: FSDP makes and frees the tensors
that it would among real processes, and bytes do not depend on what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.sharding import all_processes
from hydra_ppo.parallel.environment import Place
from hydra_ppo.parallel.world import ALONE, World

T = TypeVar("T")
Resized = Callable[[Tensor], None]
"""Is told of a tensor whose storage has become empty, or has been filled again."""


class PretendedWorld(World):
    """Rank 0 of some processes that are not there: it does its share of the work, and what others would send is its own.

    Args:
        size: processes.
        rows: of a rollout.
    """

    def __init__(self, size: int, rows: int) -> None:
        super().__init__(Place(0, size, 0, size))
        self.rows = rows
        self._ended = True

    def together(self, work: Callable[[], T], where: str) -> T:
        """Do the work."""
        return work()

    def anybody(self, wish: bool) -> bool:
        """Return the wish."""
        return wish

    def from_main(self, make: Callable[[], T], where: str) -> T:
        """Return what this process makes."""
        return make()

    def gather(self, mine: T) -> list[T]:
        """Return what this process has; of rows that others would have sampled, copies of its own."""
        if isinstance(mine, dict) and mine:
            own: Any = list(mine.values())
            return [{row: mine.get(row, own[row % len(own)]) for row in range(self.rows)}]  # type: ignore[list-item]
        return [mine] * self.size

    def check_alike(self, tensors: Iterable[Tensor], where: str) -> None:
        """Nobody is there to differ."""

    def _meet(self, collective: Callable[[], Any]) -> None:
        pass


@contextmanager
def pretended(size: int, rows: int, resized: Resized) -> Iterator[World]:
    """Be rank 0 of `size` processes inside the block.

    Args:
        size: processes; 1 is `ALONE`.
        rows: of a rollout.
        resized: told of every storage that FSDP empties or fills, which no dispatch mode sees.

    Raises:
        ConfigError: this process is one of several already.
    """
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise ConfigError(f"world={size} is simulated in one process, and this one is of {dist.get_world_size()}; start one.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        all_processes("cpu", dist.group.WORLD)  # which reads numbers, and fake tensors have none
        with ExitStack() as stack:
            stack.enter_context(_plain_bytes())
            stack.enter_context(watched(resized))
            yield PretendedWorld(size, rows)
    finally:
        all_processes.cache_clear()
        dist.destroy_process_group()


@contextmanager
def watched(resized: Resized) -> Iterator[None]:
    """Tell of each storage that FSDP empties or fills inside the block."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    def telling(change: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def changed(tensor: Tensor) -> None:
            before = tensor.untyped_storage().nbytes()
            change(tensor)
            if tensor.untyped_storage().nbytes() != before:
                resized(tensor)

        return changed

    fill, empty = telling(_fsdp_param.alloc_storage), telling(_fsdp_param.free_storage)
    with (
        patch.object(_fsdp_param, "alloc_storage", fill),
        patch.object(_fsdp_param, "free_storage", empty),
        patch.object(_fsdp_param_group, "alloc_storage", fill),
    ):
        yield


@contextmanager
def _plain_bytes() -> Iterator[None]:
    """Let a gathered 4-bit weight be a plain tensor that knows how it is read: of fake ones no parameter can be made."""
    import bitsandbytes.nn.modules as bnb

    def mend(module: Any) -> None:
        if getattr(module.weight, "quant_state", None) is None:
            module.weight.quant_state = module.quant_state

    with patch.object(bnb, "fix_4bit_weight_quant_state_from_module", mend):
        yield
