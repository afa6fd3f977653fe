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

from hydra_ppo.algorithms.losses import averaging_weights, importance_weights, policy_loss, value_loss
from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.algorithms.penalties import kl_penalty
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.experience import FinishedExperience
from hydra_ppo.model.adapters import adapter_parameters
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.interruption import check_stop
from hydra_ppo.training.away import bring_back, send_away
from hydra_ppo.training.metrics import Metrics
from hydra_ppo.training.optim import clip_gradients, fresh_scaler
from hydra_ppo.training.ppo_metrics import POLICY, VALUE, mean_of, spikes
from hydra_ppo.training.ppo_state import PartialStep, PPOState
from hydra_ppo.training.practice import Practising

NAMES = {"actor": POLICY, "critic": VALUE}
NORM = {"actor": POLICY.index("policy/grad_norm"), "critic": VALUE.index("value/grad_norm")}
"""What each role is measured by at an optimizer step, and where its gradient's norm stands: what is summed is before it."""


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
        self.parameters = {role: list(model.role_parameters(role).values()) for role in model.trainable_roles}
        self.turns = turns(config)
        self.practising: Practising | None = None
        shared = len(self.parameters) > 1 and set(self.parameters["actor"]) & set(self.parameters["critic"])
        if len(self.turns) > 1 and shared:
            raise ConfigError(
                f"update_order={config.update_order!r} with critic_updates_per_actor={config.critic_updates_per_actor} steps "
                "actor and critic apart, and here they train the same parameters; use update_order='together' and 1 update."
            )
        self.ema: list[Tensor] = []
        if config.ema_decay is not None:
            self.ema = list(adapter_parameters(model.base, "actor_ema").values())
            self.adapter: list[Tensor] = list(adapter_parameters(model.base, "actor").values())

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """All that the updates change, by role."""
        return [parameter for parameters in self.parameters.values() for parameter in parameters]

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
        if part.turns_done >= len(self.turns):
            raise ConfigError("update_order='together' cannot go on between the halves of a step; use 'in-turn', as it began.")
        self.model.train()
        if state.moments_leave:
            self.on_phase("optimizer")
            bring_back(state.optimizer)
        minibatches = part.experience.minibatches(config.ppo_epochs, config.minibatch_size, state.shuffler)
        for number, minibatch in enumerate(minibatches):
            if number < part.optimizer_steps:
                continue
            size = self.world.rows_at_once(len(minibatch), state.limits.sizes["microbatch_size"])
            micro_batches = minibatch.split(size, config.microbatch_tokens)
            state.limits.fit(
                "microbatch_size",
                f"step={step} phase=update",
                partial(self._minibatch, minibatch, part, train_actor, f"step={step} optimizer step {number + 1}", step),
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
        practised = self._practised(part, step) | {"policy/stopped_early": float(part.stopped)}
        return mean_of(policy, POLICY) | spikes(policy) | mean_of(value, VALUE) | practised

    def _practised(self, part: PartialStep, step: int) -> Metrics:
        """Return the mean cross-entropy of each practice; {} where nothing is practised."""
        names = [] if self.practising is None else self.practising.names
        if not names:
            return {}
        found = mean_of([row.tolist() for row in part.practice_stats], names)
        check_measured(f"step={step} phase=update", found, self.state.scaler)
        return found

    def _micro_batches(self, minibatch: FinishedExperience, size: int) -> Iterator[tuple[FinishedExperience, bool]]:
        """Yield the micro-batches that this process does, and whether each counts."""
        pieces = minibatch.split(size, self.config.microbatch_tokens)
        for rows, counts in self.world.share(pieces, lambda rows: sum(minibatch.lengths[row] for row in rows)):
            check_stop()
            with allocating("experience"):
                micro = minibatch.select(rows)
            yield micro, counts

    def _minibatch(
        self, minibatch: FinishedExperience, part: PartialStep, train_actor: bool, where: str, step: int, microbatch_size: int
    ) -> None:
        """Take the optimizer steps of a minibatch that are not done yet; the size of micro-batches changes no result."""
        for roles in self.turns[part.turns_done :]:
            stepped = [role for role in roles if role != "actor" or (train_actor and not part.stopped)]
            if stepped:
                self._turn(stepped, minibatch, part, where, step, microbatch_size)
            part.turns_done += 1
        self.state.schedule.step()
        part.optimizer_steps += 1
        part.turns_done = 0

    def _turn(
        self,
        roles: Sequence[str],
        minibatch: FinishedExperience,
        part: PartialStep,
        where: str,
        step: int,
        microbatch_size: int,
    ) -> None:
        """Go through the micro-batches for these roles, step them together, and note what they are measured by."""
        config = self.config
        count = minibatch.response_mask.sum()
        actor = partial(self.actor_backward, rows=len(minibatch), largest=(largest := self._no_largest()))
        passes: dict[str, Callable[..., Tensor]] = {"actor": actor, "critic": self.critic_backward}
        measured = {role: torch.zeros(len(NAMES[role]), device=self.model.device) for role in roles}

        def backward() -> None:
            for micro, counts in self._micro_batches(minibatch, microbatch_size):
                for role in roles:
                    self.on_phase(f"update-{role}")
                    measured[role][: NORM[role]] += passes[role](micro, count, counts)

        self.world.together(backward, f"{where}, {' and '.join(roles)}, microbatch_size={microbatch_size}")
        parameters = dict.fromkeys(parameter for role in roles for parameter in self.parameters[role])
        self.world.sum_gradients(parameters, [*measured.values(), largest])
        stepped = list(roles)
        # Reading the KL waits for the device, so only who asks for the early stop pays for it.
        if "actor" in roles and config.target_kl is not None and measured["actor"][1].item() > config.target_kl:
            part.stopped = True
            stepped.remove("actor")
            for parameter in self.parameters["actor"]:
                parameter.grad = None
        if not stepped:
            return
        practised = None
        if "actor" in stepped and self.practising is not None and self.practising.practices:
            self.on_phase("update-actor")
            size, place = (microbatch_size, config.microbatch_tokens), (step, part.optimizer_steps)
            practised = self.practising.add(place, size, where)
        self.on_phase("optimizer")
        if "actor" in stepped:
            measured["actor"][-1].copy_(largest.amax())
        norms = self.world.alike(partial(self.optimizer_step, stepped), where)
        for role, norm in zip(stepped, norms, strict=True):
            measured[role][NORM[role]].copy_(norm)  # allocates nothing: out of memory from here on, a step would be done twice
            (part.actor_stats if role == "actor" else part.critic_stats).append(measured[role])
        if practised is not None:
            part.practice_stats.append(practised)

    def _drop_gradients(self) -> None:
        """Forget what a failed minibatch left behind."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.scaler = fresh_scaler(self.state.scaler, self.model.device)

    def _no_largest(self) -> Tensor:
        """Return room for the largest ratio that each process finds: one each, so that a sum gathers them."""
        return torch.zeros(self.world.size, device=self.model.device)

    def actor_backward(
        self,
        micro: FinishedExperience,
        count: Tensor,
        counts: bool = True,
        rows: int | None = None,
        largest: Tensor | None = None,
    ) -> Tensor:
        """Add the actor's gradients of one micro-batch; return (5,) loss, approx_kl, clip_frac, ratio, entropy.

        Args:
            count: () tokens of the whole minibatch.
            counts: else zeros are added and returned, by the same passes.
            rows: responses of the whole minibatch; None where this is all of it.
            largest: (processes,) the largest ratio of each so far; this one's is raised where a token here has a larger one.
        """
        config = self.config
        longest = config.rollout.max_new_tokens
        average = averaging_weights(micro.response_mask, config.loss_average, rows or len(micro), count, longest)
        with self.model.role("actor"):
            found = self.model.logprobs(micro.sequences(), config.rollout.temperature, entropy_grad=config.entropy_coef > 0)
            out = policy_loss(
                found.logprobs,
                micro.old_logprobs,
                micro.advantages,
                micro.response_mask,
                config.clip_range,
                count,
                _product(_weights(micro, config.rollout.weight_cap), average),
                config.clip_range_high,
                config.dual_clip,
            )
            entropy = masked_mean(found.entropy, micro.response_mask, count)
            loss = out.loss
            if config.entropy_coef > 0:
                weighed = entropy if average is None else masked_mean(found.entropy * average, micro.response_mask, count)
                loss = loss - config.entropy_coef * weighed
            if config.kl.place == "loss" and config.kl.estimator != "none":
                penalty = kl_penalty(found.logprobs, micro.ref_logprobs, config.kl.estimator)
                penalty = penalty if average is None else penalty * average
                loss = loss + self.state.kl_coef * masked_mean(penalty, micro.response_mask, count)
            self.state.scaler.scale(loss if counts else loss * 0.0).backward()
        if not counts:
            return torch.zeros(5, device=count.device)
        if largest is not None:
            apart = (found.logprobs.detach() - micro.old_logprobs).masked_fill(~micro.response_mask, -torch.inf)
            own = largest[self.world.rank]
            own.copy_(torch.maximum(own, apart.amax().exp()))
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
        if self.ema and "actor" in roles:
            assert self.config.ema_decay is not None
            with torch.no_grad():  # or the mean would be a part of the actor's graph
                torch._foreach_lerp_(self.ema, self.adapter, 1 - self.config.ema_decay)
        return norms


def _weights(micro: FinishedExperience, cap: float | None) -> Tensor | None:
    """Return the importance weights (B, R) of a micro-batch; None where nothing was recomputed or nothing is to be weighed."""
    if cap is None or micro.sampler_logprobs is None:
        return None
    return importance_weights(micro.old_logprobs, micro.sampler_logprobs, cap)


def _product(weights: Tensor | None, average: Tensor | None) -> Tensor | None:
    return average if weights is None else weights if average is None else weights * average


def turns(config: PPOConfig) -> tuple[tuple[str, ...], ...]:
    """Return which roles are stepped together, in order, on a minibatch."""
    if not config.has_critic:
        return (("actor",),)
    first: tuple[tuple[str, ...], ...] = (("actor", "critic"),)
    if config.update_order == "in-turn":
        first = (("actor",), ("critic",))
    return (*first, *[("critic",)] * (config.critic_updates_per_actor - 1))


def build_scaler(device: torch.device, enabled: bool, updates: int) -> torch.amp.GradScaler:
    """Build what scales the losses of fp16; one that is not enabled does nothing.

    Args:
        updates: of it on each minibatch; it waits for as many times as many before it grows.
    """
    return torch.amp.GradScaler(device.type, growth_interval=2000 * updates, enabled=enabled)


def optimizer_steps(config: PPOConfig, prompts: int) -> int:
    """Return the optimizer steps of a run over so many training prompts."""
    return config.total_steps(prompts) * config.ppo_epochs * (config.rollout.batch_size // config.minibatch_size)


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
