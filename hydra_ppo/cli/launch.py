"""`hydra-ppo launch`: sft or ppo in several processes, of this machine or of a Ray cluster.

Here is what happens while they run: every rank's lines come through, a signal reaches all of them, and one that fails ends the
others and is named.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra_ppo.cli import ray_cluster
from hydra_ppo.cli.parser import Parser, positive
from hydra_ppo.cli.ray_cluster import Slots, Taken
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.runtime.interruption import SIGNALS

COMMANDS = ("sft", "ppo")
EXAMPLE = "hydra-ppo launch --ray auto --gpus 16 -- ppo ppo.yaml"

POLL = 0.5
"""Seconds that a rank is waited for when it prints nothing; a signal waits as long."""
SETTLE = 2.0
"""Seconds to look for who failed first: one that dies lets others fail at once, and may be heard of after them."""
AFTER_FAILURE = 15.0
"""Seconds that the others have to end once one has failed: what they wait for may never come."""

AWAY = 60.0
"""Seconds that an actor may not answer, as where the network fails for a while."""

FORWARDED = ("HF_", "HYDRA_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRANSFORMERS_", "WANDB_", "OMP_", "TOKENIZERS_")
"""Beginnings of names of variables that ranks inherit from the launcher, as they would from torchrun; Ray's workers do not."""


def launch(arguments: list[str]) -> int:
    """Start a command in several processes and return the exit code: 0, or that of the rank that failed first.

    Raises:
        ConfigError: for flags that do not go together, or a cluster that lacks what is asked for.
        HydraError: where ray is not installed, or an actor dies.
    """
    flags, command = split(arguments)
    parser = Parser("launch", f"Start sft or ppo in several processes, each as torchrun would: {EXAMPLE}")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local for one of this machine alone.",
    )
    parser.add_argument("--gpus", type=positive, metavar="N", help="Ranks, each with a GPU of the cluster.")
    parser.add_argument("--cpus", type=positive, metavar="N", help="Ranks without GPUs, each with a CPU slot of the cluster.")
    parser.add_argument("--nproc", type=positive, metavar="N", help="Ranks on this machine, without Ray, by torchrun.")
    parser.add_argument("--wait", type=positive, metavar="S", help="Seconds to wait for the cluster to have so many free.")
    parser.add_argument("--grace", type=positive, default=120, metavar="S", help="Seconds between SIGTERM and SIGKILL.")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="Hand this variable to the ranks, too.")
    options = parser.parse_args(flags)
    check(options.ray, options.gpus, options.cpus, options.nproc, command)
    ours = ["-m", "hydra_ppo", *command]
    if options.ray is None:
        return _torchrun(options.nproc, ours)
    slots = Slots(options.gpus or options.cpus, "GPU" if options.gpus else "CPU", options.wait)
    return on_ray(options.ray, slots, ours, inherited(os.environ, options.env), os.getcwd(), options.grace)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of launch, and the command after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def check(ray: str | None, gpus: int | None, cpus: int | None, nproc: int | None, command: Sequence[str]) -> None:
    """Refuse flags that do not go together, and commands that run in one process.

    Raises:
        ConfigError: naming them.
    """
    if not command:
        raise ConfigError(f"launch was given no command; write it behind --, as in {EXAMPLE}")
    if command[0] not in COMMANDS:
        raise ConfigError(f"launch -- {command[0]}, which runs in one process; launch sft or ppo.")
    if ray is not None and nproc is not None:
        raise ConfigError(f"--ray {ray} and --nproc {nproc} name two places to run; leave one out.")
    if ray is not None and (gpus is None) == (cpus is None):
        raise ConfigError(f"--ray {ray} needs --gpus N, or --cpus N on machines without GPUs, and not both; give one of them.")
    if ray is None and (gpus or cpus):
        flag = f"--gpus {gpus}" if gpus else f"--cpus {cpus}"
        raise ConfigError(f"{flag} is of a Ray cluster, and --ray is not given; add --ray auto, or use --nproc N.")
    if ray is None and nproc is None:
        raise ConfigError(f"launch was not told where; use --nproc N for this machine, or --ray, as in {EXAMPLE}")


def inherited(environment: Mapping[str, str], named: Sequence[str]) -> dict[str, str]:
    """Return the variables that ranks get from the launcher.

    Raises:
        ConfigError: where one that was asked for by name is not set.
    """
    if missing := [name for name in named if name not in environment]:
        raise ConfigError(f"--env {missing[0]} is not set here; set it, or leave it out.")
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED) or name in named}


def _torchrun(count: int, command: Sequence[str]) -> int:
    """Become torchrun, which does all this on one machine."""
    sys.stdout.flush()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *command]
    os.execv(sys.executable, start)


def on_ray(address: str, slots: Slots, command: Sequence[str], variables: Mapping[str, str], folder: str, grace: float) -> int:
    """Run a command in each slot of a Ray cluster and return the exit code.

    Args:
        address: of the cluster.
        slots: ranks, and what each needs.
        command: arguments of each node's Python.
        variables: that each rank gets besides those of its place.
        folder: that each runs in, the same on all nodes.
        grace: seconds between SIGTERM and SIGKILL.
    """
    with ray_cluster.connected(address, slots) as ray, ray_cluster.taking(ray, slots) as taken, hearing() as heard:
        return Ranks(ray, taken, heard, grace).run(command, variables, folder)


class Heard:
    """The signals that came."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


@contextmanager
def hearing() -> Iterator[Heard]:
    """Count SIGTERM, SIGINT and SIGHUP inside the block; Ray's own handlers, which would end this process, come back after."""
    heard = Heard()
    known = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, heard) for number in known}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ranks:
    """The ranks of a run while it lasts.

    Args:
        ray: the module.
        taken: an actor for each rank.
        heard: signals of the launcher.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, ray: Any, taken: Sequence[Taken], heard: Heard, grace: float) -> None:
        self.ray, self.taken, self.heard, self.grace = ray, taken, heard, grace
        self.ended: dict[int, tuple[int, float]] = {}  # rank: exit code, when
        self.lost: dict[int, str] = {}  # rank: why its actor is gone
        self.deadline: float | None = None  # when what still runs is killed
        self.signals = 0  # that were passed on
        self.stopping = False
        self.late: set[int] = set()  # that had to be killed
        self.silent: dict[int, float] = {}  # since when an actor does not answer
        self.blamed: list[int] = []  # that had failed before any was asked to stop

    def run(self, command: Sequence[str], variables: Mapping[str, str], folder: str) -> int:
        """Start all ranks, and go along until the last has ended."""
        places = [seat.place for seat in self.taken]
        own = ray_cluster.variables_of(places)
        starts = [
            seat.actor.start.remote(list(command), dict(variables) | ours, folder)
            for seat, ours in zip(self.taken, own, strict=True)
        ]
        try:
            for rank, obstacle in enumerate(self._get(starts)):
                if obstacle is not None:
                    raise HydraError(f"rank {rank} on {self._node(rank)}: {obstacle}.")
            self._follow()
        finally:
            self._send(signal.SIGKILL)
        return self._verdict()

    def _get(self, calls: Sequence[Any]) -> list[Any]:
        found = []
        for rank, call in enumerate(calls):
            try:
                found.append(self.ray.get(call))
            except self.ray.exceptions.RayError as error:
                raise HydraError(self._died(rank, ray_cluster.why_it_died(error))) from error
        return found

    def _follow(self) -> None:
        """Fetch what ranks print, each by a call of its own that waits there."""
        calls = {seat.actor.report.remote(POLL): rank for rank, seat in enumerate(self.taken)}
        failed_at: float | None = None
        while calls:
            ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=POLL)
            for call in ready:
                rank = calls.pop(call)
                try:
                    report = self.ray.get(call)
                except self.ray.exceptions.RayError as error:
                    if self._may_come_back(rank, error):
                        calls[self.taken[rank].actor.report.remote(POLL)] = rank
                    else:
                        self.lost[rank] = ray_cluster.why_it_died(error)
                    continue
                self.silent.pop(rank, None)
                for stream, line in report.lines:
                    say(rank, stream, line)
                if report.code is None:
                    calls[self.taken[rank].actor.report.remote(POLL)] = rank
                else:
                    self.ended[rank] = report.code, report.ended or 0.0
            now = time.monotonic()
            if failed_at is None and (self.lost or any(code for code, _ in self.ended.values())):
                failed_at = now
            if failed_at is not None and now - failed_at > SETTLE and not self.stopping:
                self._stop(min(self.grace, AFTER_FAILURE))
            if self.heard.count > self.signals:
                again, self.signals = self.signals > 0, self.heard.count
                self._stop(0.0 if again else self.grace)
            if self.deadline is not None and now > self.deadline:
                self.late |= set(range(len(self.taken))) - self.ended.keys() - self.lost.keys()
                self._send(signal.SIGKILL)
                self.deadline = now + self.grace  # of a node that does not answer

    def _may_come_back(self, rank: int, error: Exception) -> bool:
        """Whether an actor does not answer, and has not for so long that it counts as lost; Ray says when it is dead."""
        if not isinstance(error, self.ray.exceptions.ActorUnavailableError):
            return False
        time.sleep(POLL / 5)  # the answer came at once
        return time.monotonic() - self.silent.setdefault(rank, time.monotonic()) < AWAY

    def _stop(self, grace: float) -> None:
        """Ask all ranks to stop, and see to it that they have after `grace` seconds."""
        self.stopping = True
        self.blamed = self.blamed or [rank for rank, (code, _) in self.ended.items() if code]
        self._send(signal.SIGTERM)
        self.deadline = time.monotonic() + grace

    def _send(self, number: int) -> None:
        for rank, seat in enumerate(self.taken):
            if rank not in self.lost and (rank not in self.ended or number == signal.SIGKILL):
                with suppress(self.ray.exceptions.RayError):
                    call = seat.actor.send.remote(int(number))
                    if number == signal.SIGKILL:
                        self.ray.wait([call], timeout=2 * POLL)

    def _verdict(self) -> int:
        """Return the exit code, and name the rank that failed first."""
        if self.lost:
            rank, reason = next(iter(self.lost.items()))
            raise HydraError(self._died(rank, reason))
        # SIGTERM ends a rank that is not training yet, or has already stopped because the others have: as it was asked to.
        asked = -signal.SIGTERM if self.signals else 0
        failed = [(code >= 0, when, rank, code) for rank, (code, when) in self.ended.items() if code not in (0, asked)]
        if not failed:
            return 0
        first = [found for found in failed if found[2] in self.blamed] or failed
        _, _, rank, code = min(first)  # one that was killed did not fail because of the others
        names = {number.value: number.name for number in signal.Signals}
        if rank in self.late:
            what = f"had not stopped {self.grace:g} seconds after SIGTERM and was killed"
        else:
            what = f"exited with code {code}" if code > 0 else f"was killed by {names.get(-code, -code)}"
        others = f"; {len(failed) - 1} more failed after it" if len(failed) > 1 else ""
        print(f"rank {rank} on {self._node(rank)} {what}{others}.", file=sys.stderr)
        return code if code > 0 else 128 - code

    def _node(self, rank: int) -> str:
        place = self.taken[rank].place
        return f"{place['name']} ({place['address']})"

    def _died(self, rank: int, reason: str) -> str:
        return f"rank {rank} on {self._node(rank)} is lost, its node or its actor died: {reason}"


def say(rank: int, stream: int, line: str) -> None:
    """Print a line of a rank where it would have printed it, and say which one it was unless that is 0."""
    with suppress(OSError, ValueError):  # a terminal that is gone
        print(line if rank == 0 else f"[rank {rank}] {line}", file=sys.stdout if stream == 1 else sys.stderr, flush=True)
