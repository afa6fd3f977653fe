"""The processes of one run, and what they do together.

Every process runs the same trainer with the same random numbers and holds all that is trained; some pieces of work are dealt
out, and what comes of them is summed or gathered. Before each such meeting all agree that nobody has failed, has run out of
memory or has been asked to stop: a process that went its own way would leave the others waiting, or, worse, sum what does
not belong together.

Agreement goes through the CPU (gloo), sums through the device's own library (NCCL on GPUs).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hydra_ppo.errors import ConfigError, HydraError, RankError
from hydra_ppo.parallel.dealing import deal, deal_in_rounds
from hydra_ppo.parallel.environment import Place
from hydra_ppo.parallel.failures import FINE, MEMORY, STOP, OtherOutOfMemory, code_of, is_lost, said, words_of
from hydra_ppo.parallel.missing import Roll
from hydra_ppo.runtime.exhaustion import is_out_of_memory
from hydra_ppo.runtime.interruption import StopRequested, check_stop, stops_wait

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a process which failed in the middle of a pass, where others may wait for it, waits to tell them."""
BUCKET = 4 * 2**20
"""Numbers that are summed at once: 16 MiB, all that a sum needs beside what it sums."""


class World:
    """One process among those of a run. `ALONE` is a run of one process, for which nothing here costs anything.

    Attributes:
        place: rank and size.
        waited: seconds spent waiting for others and summing, so far.
        in_step: whether all make the same number of passes, one at a time together, as a base that is shared out needs. A
            stop is then heard at the next meeting alone, and lack of memory in a pass ends the run.

    Memory: `BUCKET` numbers on the device, where there are others.
    """

    def __init__(self, where: Place | None = None, roll: Roll | None = None, control: Any = None) -> None:
        """Use `join`."""
        self.place = where or Place()
        self.waited, self._since = 0.0, time.perf_counter()
        self.in_step = False
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

    def share(self, pieces: Sequence[T], cost: Callable[[T], float]) -> list[tuple[T, bool]]:
        """Return the pieces of work that this process does, and whether each counts; all of them where it is alone.

        In step everybody gets as many. What does not count is done for the sake of the others, and is the smallest there is.
        """
        costs = [cost(piece) for piece in pieces]
        if not self.in_step:
            return [(pieces[number], True) for number in deal(costs, self.size)[self.rank]]
        least = min(range(len(pieces)), key=costs.__getitem__, default=0)
        return [(pieces[least if n is None else n], n is not None) for n in deal_in_rounds(costs, self.size)[self.rank]]

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
            with stops_wait() if self.in_step else nullcontext():
                found = work()
                if dist.get_backend() == "nccl":
                    torch.cuda.synchronize()  # what the device could not do is known before the others are told
            check_stop()
        except BaseException as error:
            failure = error
        self._settle(failure, where)
        return found

    def anybody(self, wish: bool) -> bool:
        """Return whether any process has a wish; asked in step."""
        flag = torch.tensor(int(wish))
        self._meet(lambda: dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control))
        return bool(flag)

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
        code = code_of(failure)
        tag = zlib.crc32(where.encode()) if where else 0
        # The largest of each: how bad it is, and whether all are at the same place; 0 is anywhere.
        words = torch.tensor([code, tag, -tag if tag else -(2**40)], dtype=torch.int64)
        if failure is not None and self.in_step:
            self._tell_in_time(words, failure)
        else:
            self._meet(lambda: dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self._control))
        worst, highest, lowest = words.tolist()
        if worst == FINE and (highest == 0 or highest == -lowest):
            return
        told = self.gather((code, where, type(failure) if isinstance(failure, HydraError) else None, words_of(failure)))
        if worst == FINE:
            self._ended = True
            places = sorted({place for _, place, *_ in told if place})
            raise said(RankError(f"the processes have come apart: {' | '.join(places)}. The last checkpoint is intact."), 0)
        self._ended = worst != MEMORY or self.in_step
        if code == worst and failure is not None:
            raise said(failure, 0)
        rank = next(rank for rank, (other, *_) in enumerate(told) if other == worst)
        _, _, kind, text = told[rank]
        if worst == STOP:
            raise StopRequested(text) from failure
        if worst == MEMORY:
            raise OtherOutOfMemory(f"out of memory on rank {rank}: {text}") from failure
        raise said((kind or HydraError)(f"rank {rank}: {text}"), 0) from failure

    def _tell_in_time(self, words: Tensor, failure: BaseException) -> None:
        """Meet the others where they have failed too; else end alone, for they are in the middle of a pass and cannot hear."""
        assert self._roll is not None
        if is_lost(failure):
            self._ended = True
            raise self._roll.call(failure) from failure
        try:
            meeting = dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
            meeting.wait(timedelta(seconds=PATIENCE))
        except RuntimeError:
            self._ended = self._roll.broken = True
            if code_of(failure) != MEMORY:
                raise said(failure, self.rank) from None
            raise said(
                RankError(
                    f"rank {self.rank}: {words_of(failure)}; with model.shard_base others are in the middle of the same pass, "
                    "so it cannot be done again in smaller pieces: choose a smaller batch. The last checkpoint is intact."
                ),
                self.rank,
            ) from failure

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
            if not tensor.is_contiguous():
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
            if not tensor.is_contiguous():
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
            raise said(
                RankError(
                    f"{where}: rank {others[0]} no longer holds what rank 0 does; the machines do not compute alike, or one of "
                    "them is faulty. The last checkpoint is intact."
                ),
                0,
            )

    def waiting_share(self) -> float:
        """Return the share of the time since the last call that processes waited, all of them together, and begin anew."""
        now = time.perf_counter()
        both = self.gather((self.waited, now - self._since))
        self.waited, self._since = 0.0, now
        return sum(waited for waited, _ in both) / sum(seconds for _, seconds in both)


ALONE = World()
"""A run of one process."""
