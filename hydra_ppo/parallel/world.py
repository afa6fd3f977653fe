"""The processes of one run, and what they do together.

Every process runs the same trainer with the same random numbers and holds all that is trained; some pieces of work are dealt
out, and what comes of them is summed or gathered. Before each such meeting all agree that nobody has failed, has run out of
memory or has been asked to stop: a process that went its own way would leave the others waiting, or, worse, sum what does
not belong together.

Agreement goes through the CPU (gloo), sums through the device's own library (NCCL on GPUs).
"""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hydra_ppo.errors import ConfigError, HydraError, RankError
from hydra_ppo.parallel.dealing import deal
from hydra_ppo.parallel.environment import Place, place
from hydra_ppo.parallel.missing import Roll
from hydra_ppo.runtime.exhaustion import is_out_of_memory
from hydra_ppo.runtime.interruption import StopRequested

T = TypeVar("T")

FINE, STOP, MEMORY, FAILED = range(4)
BUCKET = 4 * 2**20
"""Numbers that are summed at once: 16 MiB, all that a sum needs beside what it sums."""


class OtherOutOfMemory(RuntimeError):
    """Memory ran out in another process; its text is what that one said."""


class World:
    """One process among those of a run. `ALONE` is a run of one process, for which nothing here costs anything.

    Attributes:
        place: rank and size.
        waited: seconds spent waiting for others and summing, so far.

    Memory: `BUCKET` numbers on the device, where there are others.
    """

    def __init__(self, where: Place | None = None, roll: Roll | None = None, control: Any = None) -> None:
        """Use `join`."""
        self.place = where or Place()
        self.waited = 0.0
        self._roll, self._control = roll, control
        self._room: Tensor | None = None
        self._ended = self.size == 1

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.place.is_main

    def share(self, pieces: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """Return those of the pieces of work that this process does; all of them where it is alone."""
        return [pieces[number] for number in deal([cost(piece) for piece in pieces], self.size)[self.rank]]

    def rows_at_once(self, rows: int, asked: int) -> int:
        """Return how many of `rows` to take at once, so that every process has some to do: as many as asked where it has."""
        return asked if -(-rows // asked) >= self.size else -(-rows // self.size)

    # -- agreement ---------------------------------------------------------------------------------------------------

    def together(self, work: Callable[[], T], where: str) -> T:
        """Do a piece of work that others do too, and go on once everybody has done theirs.

        Args:
            work: of this process.
            where: what it is, the same for all; step and phase.

        Raises:
            StopRequested: here or elsewhere somebody asked for a stop; everybody raises it.
            OtherOutOfMemory: as a lack of memory here would be raised here.
            HydraError: what failed elsewhere, with the rank in front; its own error where it failed here.
            RankError: somebody does not answer, or does something else.
        """
        if self.size == 1:
            return work()
        failure: BaseException | None = None
        try:
            found = work()
            if dist.get_backend() == "nccl":
                torch.cuda.synchronize()  # what the device could not do is known before the others are told
        except BaseException as error:
            failure = error
        self._settle(failure, where)
        return found

    def alike(self, work: Callable[[], T], where: str) -> T:
        """Do what everybody does alike after they have agreed, where lack of memory in one process cannot be taken back.

        Raises:
            RankError: memory ran out.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if self.size == 1 or not is_out_of_memory(error):
                raise
            raise RankError(
                f"{where}: out of memory in a step that the other processes have done; choose smaller batches or ranks. The "
                "last checkpoint is intact."
            ) from error

    def from_main(self, make: Callable[[], T], where: str) -> T:
        """Return what rank 0 makes, which can be pickled, or raise what it raises."""
        if self.size == 1:
            return make()
        found = self.together(make if self.is_main else lambda: None, where)
        box: list[Any] = [found]
        self._meet(lambda: dist.broadcast_object_list(box, src=0, group=self._control))
        return box[0]

    def gather(self, mine: T) -> list[T]:
        """Return what each process gives, by rank. Only after `together`."""
        if self.size == 1:
            return [mine]
        parts: list[Any] = [None] * self.size
        self._meet(lambda: dist.all_gather_object(parts, mine, group=self._control))
        return parts

    def check_same(self, what: str, mine: Any, remedy: str, where: str) -> None:
        """Refuse to go on where processes differ in something.

        Raises:
            ConfigError: naming rank 0's and the first other value.
        """
        if self.size == 1:
            return
        self.together(lambda: None, where)
        found = self.gather(mine)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ConfigError(f"{what} is {found[0]} on rank 0 and {other} on rank {rank}; {remedy}.")

    @contextmanager
    def session(self) -> Iterator[None]:
        """Tell the others of an error that ends this process, wherever it arose, and end with them."""
        try:
            yield
        except BaseException as error:
            if not self._ended:
                self._settle(error, "")
            raise
        else:
            if not self._ended:  # the last of all: rank 0 may have failed to write
                self._settle(None, "")
        finally:
            if self.size > 1 and dist.is_initialized() and not (self._roll and self._roll.broken):
                dist.destroy_process_group()

    def _settle(self, failure: BaseException | None, where: str) -> None:
        """Learn how everybody fares; raise what ends the work of all where somebody does not fare well."""
        if isinstance(failure, RankError) and self._roll is not None and self._roll.broken:
            raise failure
        code = _code(failure)
        tag = zlib.crc32(where.encode()) if where else 0
        # The largest of each: how bad it is, and whether all are at the same place; 0 is anywhere.
        words = torch.tensor([code, tag, -tag if tag else -(2**40)], dtype=torch.int64)
        self._meet(lambda: dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self._control))
        worst, highest, lowest = words.tolist()
        if worst == FINE and (highest == 0 or highest == -lowest):
            return
        told = self.gather((code, where, type(failure) if isinstance(failure, HydraError) else None, _words(failure)))
        if worst == FINE:
            self._ended = True
            places = sorted({place for _, place, *_ in told if place})
            raise _spoken(RankError(f"the processes have come apart: {' | '.join(places)}. The last checkpoint is intact."), 0)
        self._ended = worst != MEMORY
        if code == worst and failure is not None:
            raise _spoken(failure, 0)
        rank = next(rank for rank, (other, *_) in enumerate(told) if other == worst)
        _, _, kind, text = told[rank]
        if worst == STOP:
            raise StopRequested(text) from failure
        if worst == MEMORY:
            raise OtherOutOfMemory(f"out of memory on rank {rank}: {text}") from failure
        raise _spoken((kind or HydraError)(f"rank {rank}: {text}"), 0) from failure

    def _meet(self, collective: Callable[[], Any]) -> None:
        """Take part in a collective, and find out who is missing where it fails."""
        begun = time.perf_counter()
        try:
            collective()
        except RuntimeError as error:  # of gloo and NCCL; torch's own DistError is one
            self._ended = True
            assert self._roll is not None
            raise self._roll.call(error) from error
        finally:
            self.waited += time.perf_counter() - begun

    # -- sums --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over all processes, in place. Only after `together`, with the same shapes everywhere.

        Two addends give the bits of one process that adds them; more are added in an order of the library's choice.
        """
        if self.size == 1:
            return
        filled, waiting = 0, list[tuple[Tensor, int, int]]()
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(-1)
            for start in range(0, flat.numel(), BUCKET):
                piece = flat[start : start + BUCKET]
                if filled + piece.numel() > BUCKET:
                    self._sum_room(filled, waiting)
                    filled, waiting = 0, []
                self._room_on(piece.device)[filled : filled + piece.numel()].copy_(piece)
                waiting.append((piece, filled, filled + piece.numel()))
                filled += piece.numel()
            if flat.data_ptr() != tensor.data_ptr():
                self._sum_room(filled, waiting)
                filled, waiting = 0, []
                tensor.copy_(flat.view_as(tensor))
        self._sum_room(filled, waiting)

    def _room_on(self, device: torch.device) -> Tensor:
        if self._room is None:
            self._room = torch.empty(BUCKET, dtype=torch.float32, device=device)
        return self._room

    def _sum_room(self, filled: int, waiting: Sequence[tuple[Tensor, int, int]]) -> None:
        if not filled:
            return
        assert self._room is not None
        room = self._room[:filled]
        self._meet(lambda: dist.all_reduce(room))
        for piece, start, end in waiting:
            piece.copy_(room[start:end])

    def sum_gradients(self, parameters: Iterable[nn.Parameter], others: Sequence[Tensor] = ()) -> None:
        """Add up gradients, and other tensors, over all processes. A parameter that has one nowhere keeps none."""
        if self.size == 1:
            return
        listed = list(parameters)
        device = others[0].device if others else listed[0].device
        present = torch.tensor([float(p.grad is not None) for p in listed], device=device)
        self.sum([present])
        having = [p for p, count in zip(listed, present.tolist(), strict=True) if count]
        for parameter in having:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum([*(p.grad for p in having if p.grad is not None), *others])

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give everybody what rank 0 holds. Only after `together`."""
        if self.size == 1:
            return
        for tensor in tensors:
            flat = tensor.detach().contiguous()
            self._meet(partial(dist.broadcast, flat, src=0))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat)

    def check_alike(self, tensors: Iterable[Tensor], where: str) -> None:
        """Refuse to go on where processes no longer hold the same numbers, bit for bit.

        Raises:
            RankError: naming a rank that differs from rank 0.
        """
        if self.size == 1:
            return
        # A sum of the bits, in whole numbers, so that it does not depend on an order.
        sums = [tensor.detach().contiguous().view(-1).view(torch.int32).sum(dtype=torch.int64) for tensor in tensors]
        found = self.gather(int(torch.stack(sums).sum()) if sums else 0)
        if others := [rank for rank, value in enumerate(found) if value != found[0]]:
            self._ended = True  # everybody sees it
            raise _spoken(
                RankError(
                    f"{where}: rank {others[0]} no longer holds what rank 0 does; the machines do not compute alike, or one of "
                    "them is faulty. The last checkpoint is intact."
                ),
                0,
            )

    def waiting_share(self, seconds: float) -> float:
        """Return the share of the time since the last call that processes waited, all of them together, and begin anew."""
        waited, self.waited = self.waited, 0.0
        both = self.gather((waited, seconds))
        return sum(waited for waited, _ in both) / sum(seconds for _, seconds in both)


ALONE = World()
"""A run of one process."""


def join(timeout: float) -> World:
    """Meet the other processes that torchrun started; `ALONE` where it did not.

    Args:
        timeout: seconds that anybody is waited for, now and later.

    Raises:
        ConfigError: the environment is not that of torchrun, or there are fewer GPUs than processes.
        RankError: not all have come in time.
    """
    where = place()
    if where.size == 1:
        return ALONE
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if where.local_rank >= gpus:
            raise ConfigError(
                f"LOCAL_RANK={where.local_rank}, and this machine has {gpus} GPU{'s' * (gpus > 1)}; start at most {gpus} "
                "processes here (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(where.local_rank)
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=PrefixStore("run", store),
            rank=where.rank,
            world_size=where.size,
            timeout=limit,
        )
        roll = Roll(PrefixStore("roll", store), where, timeout)
        control = dist.new_group(backend="gloo", timeout=limit) if gpus else dist.group.WORLD
    except (RuntimeError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:160]
        raise RankError(
            f"WORLD_SIZE={where.size}: rank {where.rank} on {socket.gethostname()} did not meet the others at {address} within "
            f"{timeout:g} s ({reason}); see that all are started and can reach it."
        ) from error
    return World(where, roll, control)


def _code(failure: BaseException | None) -> int:
    if failure is None:
        return FINE
    if isinstance(failure, StopRequested):
        return STOP
    return MEMORY if not isinstance(failure, HydraError) and is_out_of_memory(failure) else FAILED


def _words(failure: BaseException | None) -> str:
    if failure is None or isinstance(failure, HydraError | StopRequested):
        return str(failure or "")
    return f"{type(failure).__name__}: {failure}".rstrip(": ")


def _spoken(error: Any, rank: int) -> Any:
    """Note on an error which rank says it; the others end without a word."""
    error.said_by = rank
    return error
