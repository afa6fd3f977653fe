"""Where the processes of a run meet first."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hydra_ppo.errors import ConfigError, RankError
from hydra_ppo.parallel.environment import place
from hydra_ppo.parallel.missing import Roll
from hydra_ppo.parallel.world import ALONE, World


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
        control = dist.new_group(backend="gloo", timeout=limit)  # apart from what a base that is shared out sends
    except (RuntimeError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:160]
        raise RankError(
            f"WORLD_SIZE={where.size}: rank {where.rank} on {socket.gethostname()} did not meet the others at {address} within "
            f"{timeout:g} s ({reason}); see that all are started and can reach it."
        ) from error
    return World(where, roll, control)
