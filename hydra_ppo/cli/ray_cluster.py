"""The ranks of a run on a Ray cluster: a placement group, an actor for each GPU, and in each actor one rank as a process.

Ray is imported here alone, and only when a run is launched with it. What is trained knows nothing of Ray: each rank is started
with the environment variables of torchrun.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hydra_ppo.cli.rank_process import RankProcess, Report, free_port
from hydra_ppo.errors import ConfigError, HydraError

LOCAL = "local"
"""The address of a Ray that is started on this machine and ended with the run."""
STORE = 200_000_000
"""Bytes of object store of such a Ray, which holds nothing but lines of logs."""
PATIENCE = 60.0
"""Seconds to wait for GPUs that the cluster has and somebody else uses."""
OWN = {"RAY_worker_niceness": "0"}
"""Of a Ray that is started here: what it starts has the priority that it would have without it."""
QUIET = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}


ALIKE = ("hydra-ppo", "torch")
"""Packages of which all nodes must have one version: others agree in other ways, or not at all."""


@dataclass(frozen=True)
class Slots:
    """What the ranks of a run need of a cluster.

    Attributes:
        count: of ranks.
        resource: GPU or CPU, one for each.
        wait: seconds to wait for them; None waits a minute for those that are there and in use, and not for others.
    """

    count: int
    resource: str
    wait: float | None = None


class Seat:
    """What an actor does: it says where it is, and runs a rank."""

    def __init__(self) -> None:
        self._rank: RankProcess | None = None

    def where(self) -> dict[str, Any]:
        """Return the node, its address and name, the GPUs that Ray gives, a free port, and versions of what is installed."""
        import ray

        context = ray.get_runtime_context()
        gpus = [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
        address = ray.util.get_node_ip_address()
        return {
            "node": context.get_node_id(),
            "address": address,
            "gpus": gpus,
            "port": free_port(),
            "name": socket.gethostname(),
            "versions": {name: _version(name) for name in ALIKE},
        }

    def start(self, command: Sequence[str], variables: Mapping[str, str | None], folder: str) -> str | None:
        """Start the rank; return what stands in the way, None where nothing does."""
        import sys

        if not os.path.isdir(folder):
            return f"the folder {folder!r} is not there; launch from a folder that all nodes share"
        try:
            self._rank = RankProcess([sys.executable, *command], variables, folder)
        except OSError as error:
            return f"{command[0]} cannot be started ({error.strerror})"
        return None

    def report(self, wait: float) -> Report:
        """See `RankProcess.report`."""
        assert self._rank is not None
        return self._rank.report(wait)

    def send(self, number: int) -> None:
        """See `RankProcess.send`."""
        if self._rank is not None:
            self._rank.send(number)


@dataclass(frozen=True)
class Taken:
    """An actor, and where it is."""

    actor: Any
    place: Mapping[str, Any]


def import_ray() -> Any:
    """Return the module ray.

    Raises:
        HydraError: where it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise HydraError(f"--ray needs the package ray, which is not installed ({error}); pip install ray.") from error
    return ray


@contextmanager
def connected(address: str, slots: Slots) -> Iterator[Any]:
    """Be connected to a Ray cluster inside the block.

    Args:
        address: auto for the cluster that this machine is part of, HOST:PORT, ray://HOST:PORT, or local for one of its own.
        slots: of a local one.

    Raises:
        ConfigError: where there is no cluster.
    """
    ray = import_ray()
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:
        os.environ.update({name: os.environ.get(name, value) for name, value in OWN.items()})
        options |= {"include_dashboard": False, "object_store_memory": STORE, "address": LOCAL}
        if slots.resource == "CPU":
            options["num_cpus"] = slots.count
    else:
        options["address"] = address
        if address != "auto":
            check_reachable(address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _nobody(address, str(error).strip().partition("\n")[0] or type(error).__name__) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Refuse HOST:PORT or ray://HOST:PORT where nobody listens; Ray itself would go on trying for minutes.

    Raises:
        ConfigError: with the reason.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise _nobody(address, "it is not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, OverflowError) as error:
        raise _nobody(address, getattr(error, "strerror", None) or str(error)) from error


def _nobody(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"--ray {address}: there is no Ray cluster to be reached ({why.rstrip('.')}); start one (ray start --head), name its "
        "address, or use --ray local."
    )


@contextmanager
def taking(ray: Any, slots: Slots) -> Iterator[list[Taken]]:
    """Hold an actor for each rank inside the block, those of a node next to each other: the order is that of the ranks.

    Raises:
        ConfigError: where the cluster does not have so many, or not within `slots.wait`, or its nodes differ.
        HydraError: where a node cannot start an actor.
    """
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    flag = f"--{slots.resource.lower()}s {slots.count}"
    there = ray.cluster_resources().get(slots.resource, 0)
    if slots.wait is None and there < slots.count:
        raise ConfigError(
            f"{flag}, but the Ray cluster has {there:g}; ask for fewer, or let --wait SECONDS give it time to grow."
        )
    wanted = {"CPU": 1.0} if slots.resource == "CPU" else {"CPU": 1.0, slots.resource: 1.0}
    group = placement_group([wanted] * slots.count, strategy="PACK")
    actors: list[Any] = []
    try:
        patience = PATIENCE if slots.wait is None else slots.wait
        if not group.wait(timeout_seconds=patience):
            free = ray.available_resources().get(slots.resource, 0)
            has = ray.cluster_resources().get(slots.resource, 0)
            raise ConfigError(
                f"{flag}: after {patience:g} seconds the Ray cluster has {has:g}, of which {free:g} are free; ask for fewer, "
                "or wait longer with --wait SECONDS."
            )
        seat = ray.remote(Seat)
        for number in range(slots.count):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            gpus = {"num_gpus": 1} if slots.resource == "GPU" else {}
            actors.append(seat.options(num_cpus=1, scheduling_strategy=strategy, max_restarts=0, **gpus).remote())
        try:
            places = ray.get([actor.where.remote() for actor in actors])
        except ray.exceptions.RayError as error:
            raise HydraError(
                f"a rank's actor could not be started ({why_it_died(error)}); install hydra-ppo on each node, in the Python "
                "that Ray runs in there."
            ) from error
        check_versions(places)
        yield by_node([Taken(actor, place) for actor, place in zip(actors, places, strict=True)])
    finally:
        for actor in actors:
            with suppress(Exception):
                ray.kill(actor)
        with suppress(Exception):
            remove_placement_group(group)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions(places: Sequence[Mapping[str, Any]]) -> None:
    """Refuse nodes that would run different programs.

    Raises:
        ConfigError: naming two of them, and the package.
    """
    first = places[0]
    for place in places:
        for name, found in place["versions"].items():
            if found != (wanted := first["versions"][name]):
                raise ConfigError(
                    f"{name}=={found} is on {place['name']} ({place['address']}) and {name}=={wanted} on {first['name']} "
                    f"({first['address']}); install one version everywhere."
                )


def by_node(taken: Sequence[Taken]) -> list[Taken]:
    """Order actors so that those of a node follow each other, nodes in the order in which they come."""
    nodes = list(dict.fromkeys(seat.place["node"] for seat in taken))
    return sorted(taken, key=lambda seat: nodes.index(seat.place["node"]))


def variables_of(places: Sequence[Mapping[str, Any]]) -> list[dict[str, str | None]]:
    """Return for each rank what torchrun would set, from where the ranks are, in their order.

    Ray shows each actor its own GPU alone; a rank is shown those of all ranks of its node, and takes the one of its LOCAL_RANK.
    """
    found: list[dict[str, str | None]] = []
    for rank, place in enumerate(places):
        here = [number for number, other in enumerate(places) if other["node"] == place["node"]]
        gpus = [gpu for number in here for gpu in places[number]["gpus"]]
        variables: dict[str, str | None] = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(here.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(here)),
            "MASTER_ADDR": str(places[0]["address"]),
            "MASTER_PORT": str(places[0]["port"]),
        }
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        found.append(variables)
    return found


def why_it_died(error: BaseException) -> str:
    """Return the first line of what Ray says of an actor that is gone, without its class names and ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "reason" in line.lower() or "died" in line.lower()), lines[0] if lines else "")
    return (reason or type(error).__name__)[:200]
