"""The updates of a PPO step: several epochs over one rollout, an optimizer step a minibatch.

Per micro-batch the actor's clipped loss goes forward and backward, then the critic's, so that only one role's graph is alive.
In-turn the actor goes through all micro-batches and takes its step before the critic begins, so that only one role's gradients
are. No parameter serves both, so either order gives the same bits.

Sources: Schulman et al. 2017 (arXiv 1707.06347), sections 3 and 5; Santacroce et al. 2023 (arXiv 2309.00754), section 3.2.
Departure: actor and critic have gradient norms, and clips, of their own.

fp16: a loss scale is a power of two, so it changes no bit unless a gradient leaves the range. Together, an overflow of either
role keeps both from stepping; in-turn it keeps that role alone, and the critic's scale is already halved after the actor's. A
scale grows after as many optimizer steps as it would together, which may fall between the two halves of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hydra_ppo.algorithms.advantages import gae
from hydra_ppo.algorithms.losses import importance_weights, policy_loss, value_loss
from hydra_ppo.algorithms.masked import masked_mean, whiten
from hydra_ppo.algorithms.penalties import kl_penalised_rewards
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.experience import FinishedExperience, ScoredExperience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.interruption import check_stop
from hydra_ppo.training.away import bring_back, send_away
from hydra_ppo.training.metrics import Metrics
from hydra_ppo.training.optim import clip_gradients, fresh_scaler
from hydra_ppo.training.ppo_metrics import POLICY, VALUE, mean_of
from hydra_ppo.training.ppo_state import PartialStep, PPOState


class Updates:
    """Trains actor and critic on finished experience.

    Args:
        model: at stage `ppo`.
        config: every setting.
        state: optimizer, scaler and limits, which the updates change.
        on_phase: told update-actor, update-critic and optimizer as they begin; optimizer too where its state comes and goes.
        world: the processes that share micro-batches out; gradients are summed before each optimizer step.

    Raises:
        ConfigError: where actor and critic share parameters, and are to be stepped in turn.

    Memory: gradients of both adapters and the value head, in-turn of one role at a time; one role's graph of one micro-batch.
    """

    def __init__(
        self, model: HydraModel, config: PPOConfig, state: PPOState, on_phase: Callable[[str], None], world: World = ALONE
    ) -> None:
        self.model, self.config, self.state, self.on_phase, self.world = model, config, state, on_phase, world
        self.actor_parameters = list(model.role_parameters("actor").values())
        self.critic_parameters = list(model.role_parameters("critic").values())
        self.parameters = {"actor": self.actor_parameters, "critic": self.critic_parameters}
        if config.update_order == "in-turn" and set(self.actor_parameters) & set(self.critic_parameters):
            raise ConfigError(
                "update_order='in-turn' steps the actor before the critic, and here they train the same parameters; use "
                "update_order='together'."
            )

    def run(self, part: PartialStep, *, train_actor: bool = True, step: int = 0) -> Metrics:
        """Run the PPO epochs over one rollout, or what is left of them, and return what they are measured by.

        Args:
            part: the rollout, and what was done already; counts on as minibatches are done.

        Raises:
            ConfigError: `part` stands between actor and critic, and the order is together.
            NonFiniteError: naming step, optimizer step and quantity.
            OutOfMemory: when one row at a time does not fit.
        """
        config, state = self.config, self.state
        if part.actor_done and config.update_order == "together":
            raise ConfigError("update_order='together' cannot go on between the halves of a step; use 'in-turn', as it began.")
        self.model.train()
        if state.moments_leave:
            self.on_phase("optimizer")
            bring_back(state.optimizer)
        update = self._in_turn if config.update_order == "in-turn" else self._minibatch
        minibatches = part.experience.minibatches(config.ppo_epochs, config.minibatch_size, state.shuffler)
        for number, minibatch in enumerate(minibatches):
            if number < part.optimizer_steps:
                continue
            size = self.world.rows_at_once(len(minibatch), state.limits.sizes["microbatch_size"])
            micro_batches = minibatch.split(size, config.microbatch_tokens)
            state.limits.fit(
                "microbatch_size",
                f"step={step} phase=update",
                partial(update, minibatch, part, train_actor, f"step={step} optimizer step {number + 1}"),
                undo=self._drop_gradients,
                most=max(len(rows) for rows in micro_batches),
            )
        if state.moments_leave:
            send_away(state.optimizer)
        # The one wait for the device; what is first not finite is the cause of all that follows.
        policy, value = ([] if not rows else torch.stack(rows).tolist() for rows in (part.actor_stats, part.critic_stats))
        for rows, names in ((policy, POLICY), (value, VALUE)):
            for number, row in enumerate(rows, 1):
                where = f"step={step} phase=update, optimizer step {number}"
                check_measured(where, dict(zip(names, row, strict=True)), state.scaler)
        return mean_of(policy, POLICY) | mean_of(value, VALUE) | {"policy/stopped_early": float(part.stopped)}

    def _micro_batches(self, minibatch: FinishedExperience, size: int) -> Iterator[tuple[FinishedExperience, bool]]:
        """Yield the micro-batches that this process does, and whether each counts."""
        pieces = minibatch.split(size, self.config.microbatch_tokens)
        for rows, counts in self.world.share(pieces, lambda rows: sum(minibatch.lengths[row] for row in rows)):
            check_stop()
            with allocating("experience"):
                micro = minibatch.select(rows)
            yield micro, counts

    def _minibatch(
        self, minibatch: FinishedExperience, part: PartialStep, train_actor: bool, where: str, microbatch_size: int
    ) -> None:
        """Take one optimizer step; the result does not depend on the micro-batch size."""
        config, device = self.config, self.model.device
        count = minibatch.response_mask.sum()
        policy, value = torch.zeros(5, device=device), torch.zeros(2, device=device)
        stopped = part.stopped

        def backward() -> None:
            for micro, counts in self._micro_batches(minibatch, microbatch_size):
                if train_actor and not stopped:
                    self.on_phase("update-actor")
                    policy.add_(self.actor_backward(micro, count, counts))
                self.on_phase("update-critic")
                value.add_(self.critic_backward(micro, count, counts))

        self.world.together(backward, f"{where}, microbatch_size={microbatch_size}")
        self.world.sum_gradients(dict.fromkeys(self.actor_parameters + self.critic_parameters), [policy, value])
        # Reading the KL waits for the device, so only who asks for the early stop pays for it.
        if config.target_kl is not None and train_actor and not stopped and policy[1].item() > config.target_kl:
            stopped = True
            for parameter in self.actor_parameters:
                parameter.grad = None
        self.on_phase("optimizer")
        norms = self.world.alike(self.optimizer_step, where)
        self.state.schedule.step()
        if train_actor and not stopped:
            part.actor_stats.append(torch.cat([policy, norms[:1]]))
        part.critic_stats.append(torch.cat([value, norms[1:]]))
        part.stopped = stopped
        part.optimizer_steps += 1

    def _in_turn(
        self, minibatch: FinishedExperience, part: PartialStep, train_actor: bool, where: str, microbatch_size: int
    ) -> None:
        """Take one optimizer step, the actor first; what `part` says the actor has done is not done again."""
        if not part.actor_done:
            if train_actor and not part.stopped:
                self._half("actor", minibatch, part, where, microbatch_size)
            part.actor_done = True
        self._half("critic", minibatch, part, where, microbatch_size)
        self.state.schedule.step()
        part.optimizer_steps += 1
        part.actor_done = False

    def _half(self, role: str, minibatch: FinishedExperience, part: PartialStep, where: str, microbatch_size: int) -> None:
        """Go through the micro-batches for one role, step it, and note what it is measured by."""
        config, actor = self.config, role == "actor"
        count = minibatch.response_mask.sum()
        measured = torch.zeros(6 if actor else 3, device=self.model.device)  # the last is the norm

        def backward() -> None:
            for micro, counts in self._micro_batches(minibatch, microbatch_size):
                self.on_phase(f"update-{role}")
                measured[:-1] += (self.actor_backward if actor else self.critic_backward)(micro, count, counts)

        self.world.together(backward, f"{where}, {role}, microbatch_size={microbatch_size}")
        self.world.sum_gradients(self.parameters[role], [measured])
        if actor and config.target_kl is not None and measured[1].item() > config.target_kl:
            part.stopped = True
            self.state.optimizer.zero_grad(set_to_none=True)
            return
        self.on_phase("optimizer")
        norm = self.world.alike(partial(self.optimizer_step, [role]), where)
        measured[-1:].copy_(norm)  # allocates nothing: where memory ran out from here on, the step would be done twice
        (part.actor_stats if actor else part.critic_stats).append(measured)

    def _drop_gradients(self) -> None:
        """Forget what a failed minibatch left behind."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.scaler = fresh_scaler(self.state.scaler, self.model.device)

    def actor_backward(self, micro: FinishedExperience, count: Tensor, counts: bool = True) -> Tensor:
        """Add the actor's gradients of one micro-batch; return (5,) loss, approx_kl, clip_frac, ratio, entropy.

        Args:
            counts: else zeros are added and returned, by the same passes.
        """
        config = self.config
        with self.model.role("actor"):
            found = self.model.logprobs(micro.sequences(), config.rollout.temperature, entropy_grad=config.entropy_coef > 0)
            out = policy_loss(
                found.logprobs,
                micro.old_logprobs,
                micro.advantages,
                micro.response_mask,
                config.clip_range,
                count,
                _weights(micro, config.rollout.weight_cap),
            )
            entropy = masked_mean(found.entropy, micro.response_mask, count)
            loss = out.loss - config.entropy_coef * entropy if config.entropy_coef > 0 else out.loss
            self.state.scaler.scale(loss if counts else loss * 0.0).backward()
        if not counts:
            return torch.zeros(5, device=count.device)
        return torch.stack([out.loss.detach(), out.approx_kl, out.clip_frac, out.ratio, entropy.detach()])

    def critic_backward(self, micro: FinishedExperience, count: Tensor, counts: bool = True) -> Tensor:
        """Add the critic's gradients of one micro-batch; return (2,) loss, clip_frac. `counts` as of the actor."""
        config = self.config
        with self.model.role("critic"):
            values = self.model.values(micro.sequences())
            out = value_loss(values, micro.old_values, micro.returns, micro.response_mask, config.value_clip_range, count)
            self.state.scaler.scale((config.vf_coef if counts else 0.0) * out.loss).backward()
        if not counts:
            return torch.zeros(2, device=count.device)
        return torch.stack([out.loss.detach(), out.clip_frac])

    def optimizer_step(self, roles: Sequence[str] = ("actor", "critic")) -> Tensor:
        """Clip, step, and return the gradient norms (one per role) before the clip; what has no gradient is left alone."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        limit = self.config.optimizer.max_grad_norm
        norms = torch.stack([clip_gradients(self.parameters[role], limit).to(self.model.device) for role in roles])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return norms


def _weights(micro: FinishedExperience, cap: float | None) -> Tensor | None:
    """Return the importance weights (B, R) of a micro-batch; None where nothing was recomputed or nothing is to be weighed."""
    if cap is None or micro.sampler_logprobs is None:
        return None
    return importance_weights(micro.old_logprobs, micro.sampler_logprobs, cap)


def with_advantages(experience: ScoredExperience, scores: Tensor, config: PPOConfig, kl_coef: float) -> FinishedExperience:
    """Find advantages and returns, both (B, R), from scores (B,) and the rollout's log-probs and values."""
    mask = experience.response_mask
    rewards = kl_penalised_rewards(scores, experience.old_logprobs, experience.ref_logprobs, mask, kl_coef, config.kl.estimator)
    advantages, returns = gae(rewards, experience.old_values, mask, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return experience.finished(advantages, returns)


def build_scaler(device: torch.device, enabled: bool, update_order: str) -> torch.amp.GradScaler:
    """Build what scales the losses of fp16; one that is not enabled does nothing.

    In-turn it is updated twice per optimizer step, so it waits for twice as many updates before it grows.
    """
    twice = 2 if update_order == "in-turn" else 1
    return torch.amp.GradScaler(device.type, growth_interval=2000 * twice, enabled=enabled)


def optimizer_steps(config: PPOConfig) -> int:
    """Return the optimizer steps of a run."""
    return config.steps * config.ppo_epochs * (config.rollout.batch_size // config.minibatch_size)


def check_measured(where: str, metrics: Metrics, scaler: torch.amp.GradScaler) -> None:
    """Refuse to go on with a number that is NaN or infinite; a gradient norm may be, once, where fp16 finds its scale.

    Raises:
        NonFiniteError: naming where, and the quantity.
    """
    for name, value in metrics.items():
        overflow = name.endswith("grad_norm") and scaler.is_enabled() and scaler.get_scale() >= 1
        if value is not None and not math.isfinite(value) and not overflow:
            raise NonFiniteError(
                f"{where}: {name} is {value}; lower optimizer.learning_rate or use a wider model.dtype. "
                "The last checkpoint is intact."
            )
