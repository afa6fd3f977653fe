"""What several processes that train together ask of a trainer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import World
from hydra_ppo.training.metrics import Metrics


def keep_in_step(world: World, model: HydraModel) -> None:
    """Let all processes make the same passes where the model's base is shared out among them.

    Raises:
        ConfigError: it is, and the trainer was given no world.
    """
    if model.is_sharded and world.size == 1:
        raise ConfigError(
            "model.shard_base=true shares the base out over several processes, and the trainer knows of one; give it the world "
            "that parallel.joining.join returns."
        )
    if world.size > 1:
        world.in_step = model.is_sharded


def end_step(world: World, trained: Iterable[Tensor], where: str) -> Metrics:
    """See that all processes hold the same after a step; return the share of time that they waited since the last; {} alone.

    Raises:
        RankError: they do not.
    """
    if world.size == 1:
        return {}
    waiting = world.waiting_share()
    world.check_alike(trained, where)
    return {"parallel/waiting": waiting}
