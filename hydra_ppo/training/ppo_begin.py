"""What a PPO run is given, and its state before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.dealing import check_divides
from hydra_ppo.parallel.world import World
from hydra_ppo.rewards.scorer import Scorer
from hydra_ppo.runtime.exhaustion import Limits
from hydra_ppo.training.optim import build_optimizer
from hydra_ppo.training.ppo_state import PPOState, PromptBatches
from hydra_ppo.training.ppo_update import build_scaler, optimizer_steps, turns


def check_given(model: HydraModel, config: PPOConfig, prompts: Sequence[PromptRow], world: World) -> None:
    """Refuse a model of another stage, no prompts at all, and batches that so many processes cannot share.

    Raises:
        ConfigError: naming what is wrong.
    """
    if model.train_stage != config.stage:
        raise ConfigError(
            f"model is at stage {model.train_stage!r}, PPO needs {config.stage!r} for advantage={config.advantage!r} and "
            f"ema_decay={config.ema_decay}; build it with train={config.stage!r}."
        )
    if not prompts:
        raise ConfigError("data.train holds no prompt after the held-out ones are taken; give more rows.")
    check_divides(world.size, rollout__batch_size=config.rollout.batch_size, minibatch_size=config.minibatch_size)


def begin(
    model: HydraModel,
    config: PPOConfig,
    prompts: Sequence[PromptRow],
    scorer: Scorer,
    decoded: int,
    note: Callable[[str], None],
) -> PPOState:
    """Return the state of a run that has not begun.

    Args:
        decoded: most responses that are decoded together, where settings do not say.
        note: takes a line where less is done at once than was asked for.
    """
    roles = ["actor", "critic"] if config.has_critic else ["actor"]
    shuffler = torch.Generator().manual_seed(config.run.seed)
    copies = config.rollout.samples_per_prompt
    rate = config.optimizer.learning_rate
    rates = {"actor": rate, "critic": config.critic_learning_rate or rate}
    groups = [(model.role_parameters(role), rates[role]) for role in roles]
    optimizer, schedule = build_optimizer(groups, config.optimizer, optimizer_steps(config, len(prompts)))
    sizes = {
        "rollout.generation_batch_size": config.rollout.generation_batch_size or decoded,
        "rollout.score_batch_size": config.rollout.score_batch_size,
        "microbatch_size": config.microbatch_size,
    }
    state = PPOState(
        optimizer=optimizer,
        schedule=schedule,
        # fp16 gradients underflow without a scaled loss; with every other type the scaler does nothing.
        scaler=build_scaler(model.device, model.causal_lm.dtype == torch.float16, len(turns(config))),
        names={id(parameter): name for named, _ in reversed(groups) for name, parameter in named.items()},
        limits=Limits(sizes, model.device, note),
        sampler=torch.Generator(model.device).manual_seed(config.run.seed),
        shuffler=shuffler,
        batches=PromptBatches(prompts, config.rollout.batch_size // copies, copies, shuffler),
        scorer=scorer,
        kl_coef=config.kl.coef,
        moments_leave=config.optimizer.offload_in_rollout,
    )
    state.capture()
    return state
