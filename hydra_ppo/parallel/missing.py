"""Finds out which process of a run is missing, once a collective has failed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from hydra_ppo.errors import RankError
from hydra_ppo.parallel.environment import Place

ANSWER, PAUSE = 10.0, 0.05
"""Seconds that others are given to say that they are there, and between two looks."""


class Roll:
    """Names of all processes, and whether they answer.

    Args:
        store: that all can reach.
        where: this process.
        timeout: seconds that others are waited for in a collective, for the message.

    Attributes:
        broken: whether somebody was found missing; there are no meetings from then on.
    """

    def __init__(self, store: Any, where: Place, timeout: float) -> None:
        self.store, self.where, self.timeout = store, where, timeout
        self.broken = False
        store.set(f"name/{where.rank}", f"{os.getpid()} {socket.gethostname()}")
        self.names = [store.get(f"name/{rank}").decode().split(" ", 1) for rank in range(where.size)]

    def call(self, cause: BaseException) -> RankError:
        """Ask who is there, and return the error that names who is not; it is said by the lowest rank that is.

        Args:
            cause: what the collective failed with.
        """
        self.broken = True
        try:
            there, dead = self._ask()
        except RuntimeError:  # the store is gone, and with it the process that held it
            there, dead = set(range(1, self.where.size)), [0]
        missing = [rank for rank in range(self.where.size) if rank not in there]
        if missing:
            named = " and ".join(
                f"rank {rank} (process {self.names[rank][0]} on {self.names[rank][1]})" for rank in dead or missing
            )
            what = "ended without a word" if dead else f"did not answer within run.rank_timeout={self.timeout:g} s"
            text = f"{named} {what}; the others end too"
        else:
            text = f"the processes lost each other ({' '.join(str(cause).split())[:160]})"
        error: Any = RankError(f"{text}. The last checkpoint is intact; go on with --resume.")
        living = set(range(self.where.size)) - set(dead) if dead else there  # whoever is slow to answer will find out too
        error.said_by = min(living | {self.where.rank})
        return error

    def _ask(self) -> tuple[set[int], list[int]]:
        """Return who answers, and who is known to be dead."""
        here = self.where.rank
        self.store.set(f"there/{here}", "")
        deadline = time.monotonic() + ANSWER
        while True:
            there = {rank for rank in range(self.where.size) if rank == here or self.store.check([f"there/{rank}"])}
            dead = [rank for rank in range(self.where.size) if rank not in there and self._is_dead(rank)]
            if dead or len(there) == self.where.size or time.monotonic() > deadline:
                break
            time.sleep(PAUSE)
        self.store.set(f"heard/{here}", "")
        if here == 0:  # which may hold the store: whoever is there reads it before it goes
            self._wait_for(sorted(there), min(deadline + 1.0, time.monotonic() + 2.0))
        return there, dead

    def _wait_for(self, ranks: Sequence[int], deadline: float) -> None:
        while time.monotonic() < deadline and not all(self.store.check([f"heard/{rank}"]) for rank in ranks):
            time.sleep(PAUSE)

    def _is_dead(self, rank: int) -> bool:
        """Say whether a process of this machine is gone; of other machines nobody knows."""
        pid, host = self.names[rank]
        if host != socket.gethostname():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:  # one that its parent has not taken leave of yet
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return False
