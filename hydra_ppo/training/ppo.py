"""Proximal policy optimisation with all four roles on one base.

A step, in order:

1. sample a response to each prompt (actor), then score it: one LoRA-off pass (reference, reward), one critic pass
2. rewards: per-token KL penalty, the score at the last token
3. advantages by GAE, whitened over the rollout
4. per epoch, minibatch and micro-batch: the actor's clipped loss forward and backward, then the critic's, so that only one
   role's graph is alive; an optimizer step per minibatch

Sources: Schulman et al. 2017 (arXiv 1707.06347); Ziegler et al. 2019 (arXiv 1909.08593); Santacroce et al. 2023
(arXiv 2309.00754), section 3.2. Departures: none of the rollout's log-probs are recomputed for the update, and actor and
critic have gradient norms, and clips, of their own.

The device is waited for at the sampler, which decides the lengths, and once a step for the metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydra_ppo.config.settings import PPOConfig, RolloutSettings
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.experience import Experience
from hydra_ppo.functional import (
    adaptive_kl_coef,
    explained_variance,
    gae,
    kl_penalised_rewards,
    masked_mean,
    policy_loss,
    value_loss,
    whiten,
)
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rewards.scorer import Scorer
from hydra_ppo.rollout.collect import collect_experience
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.runs.checkpoint import Position, TrainerState
from hydra_ppo.runtime import random_sources
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.exhaustion import Limits
from hydra_ppo.runtime.host_memory import keep_freed_memory
from hydra_ppo.runtime.interruption import StopRequested, check_stop
from hydra_ppo.runtime.memory import PhaseMemory
from hydra_ppo.runtime.recorder import Recorder, Silent
from hydra_ppo.training.optim import build_optimizer, check_finite, clip_gradients, fresh_scaler, state_tensors
from hydra_ppo.training.ppo_metrics import POLICY, VALUE, compare, mean_of, rollout_metrics
from hydra_ppo.training.ppo_state import PartialStep, PromptBatches, Totals, capture_sources, load_state, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_SEED = 1_000_003
"""Held-out prompts are sampled with this seed, so that evaluations differ by the policy alone."""


class PPOTrainer:
    """Trains actor and critic of a HydraModel.

    Args:
        model: at stage `ppo`.
        tokenizer: turns responses into text, for reward functions and samples; names the end and pad tokens.
        config: every setting.
        prompts, eval_prompts: tokenised prompts; without eval_prompts nothing is evaluated.
        run: takes metrics, samples and progress.
        save: called where a checkpoint is due, with the held-out score where it was just measured: every
            `config.run.save_every` steps, at a best held-out score, after the last step and on a wish to stop.
        sampler: samples the responses; called as `hydra_ppo.rollout.sampling.sample` is.
        on_phase: told rollout, score, update-actor, update-critic and optimizer as they begin.

    Attributes:
        done: steps done.
        partial: the step that is being updated on, None outside of the updates.

    Memory: beyond the model, gradients and two fp32 moments per parameter of the two adapters and the value head.
    """

    def __init__(
        self,
        model: HydraModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PPOConfig,
        prompts: Sequence[PromptRow],
        eval_prompts: Sequence[PromptRow] = (),
        *,
        run: Recorder | None = None,
        save: Callable[[float | None], None] = lambda score: None,
        sampler: Callable[..., Samples] = sample,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        if model.train_stage != "ppo":
            raise ConfigError(f"model is at stage {model.train_stage!r}, PPO needs 'ppo'; build it with train='ppo'.")
        if not prompts:
            raise ConfigError("data.train holds no prompt after the held-out ones are taken; give more rows.")
        keep_freed_memory(model.device)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.prompts, self.eval_prompts = list(prompts), list(eval_prompts)[: config.eval_prompts]
        self.run = run or Silent()
        self.save = save
        self.sampler, self.on_phase = sampler, on_phase
        self.scorer = Scorer(config.reward, model.device)
        if self.scorer.needs_head and not model.reward_head_trained:
            raise ConfigError(
                "reward.sources names the reward head, but this model's was never trained; run hydra-ppo sft first, or name a "
                "function or a classifier."
            )
        self.eos_ids = end_tokens(model, tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self.kl_coef = config.kl.coef
        self.generator = torch.Generator(model.device).manual_seed(config.run.seed)
        self.shuffler = torch.Generator().manual_seed(config.run.seed)
        copies = config.rollout.samples_per_prompt
        self.batches = PromptBatches(self.prompts, config.rollout.batch_size // copies, copies, self.shuffler)
        actor, critic = model.role_parameters("actor"), model.role_parameters("critic")
        rate = config.optimizer.learning_rate
        self.optimizer, self.schedule = build_optimizer(
            [(actor, rate), (critic, config.critic_learning_rate or rate)],
            config.optimizer,
            optimizer_steps(config),
        )
        self.actor_parameters, self.critic_parameters = list(actor.values()), list(critic.values())
        self.parameter_names = {id(parameter): name for name, parameter in (critic | actor).items()}
        self.memory = PhaseMemory(model, model.device, config.run.memory)
        # fp16 gradients underflow without a scaled loss; with every other type the scaler does nothing.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.causal_lm.dtype == torch.float16)

        sizes = {
            "rollout.generation_batch_size": config.rollout.generation_batch_size or max(len(self.eval_prompts), self._rows),
            "rollout.score_batch_size": config.rollout.score_batch_size,
            "microbatch_size": config.microbatch_size,
        }
        self.limits = Limits(sizes, model.device, lambda text: self.run.note(text))
        self.done = 0
        self.partial: PartialStep | None = None
        self.totals = Totals()
        self._sources = capture_sources(self)
        self._begun = time.perf_counter()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run the steps that are left and return the summary: steps, seconds, responses per second, before and after.

        Raises:
            StopRequested: on a wish to stop, after `save` was called.
        """
        totals = self.totals
        try:
            if totals.before is None:
                totals.before = totals.after = self.evaluate(0)
            with self.run.progress(self.config.steps, "PPO") as advance:
                advance(self.done, "")
                while self.done < self.config.steps:
                    metrics = self._whole_step(self.done + 1)
                    advance(1, f"score {metrics['objective/scores']:.3f}  KL {metrics['objective/kl']:.2f}")
        except StopRequested:
            # The gradients of the minibatch that was begun go; it is done again. Parameters are those of the last step.
            self.optimizer.zero_grad(set_to_none=True)
            self.save(None)
            raise
        return {
            "steps": self.config.steps,
            "seconds": totals.seconds,
            "responses_per_second": totals.responses / totals.seconds,
            "peak_bytes": max(totals.peaks.values(), default=None),
            "phase_peak_bytes": totals.peaks or None,
            **compare(totals.before, totals.after),
        }

    def _whole_step(self, step: int) -> dict[str, float | None]:
        """Do a step, evaluate, log and save where due."""
        config, totals = self.config, self.totals
        self._begun = time.perf_counter()
        with self.memory.step(step - 1, state_tensors(self.optimizer)):
            metrics = self._advance(step)
        assert self.partial is not None
        seconds = self.partial.seconds + time.perf_counter() - self._begun
        metrics |= self._throughput(metrics, seconds) | self.memory.metrics()
        last = step == config.steps
        evaluated = last or (config.eval_every > 0 and step % config.eval_every == 0)
        found = self.evaluate(step) if evaluated else {}
        metrics |= {k: v for k, v in found.items() if not isinstance(v, list)}
        if evaluated or step % config.run.log_every == 0:
            self.run.log(step, metrics)

        totals.after = found or totals.after
        totals.responses += self._rows
        totals.seconds += seconds
        for phase, peak in self.memory.peaks.items():
            totals.peaks[phase] = max(peak, totals.peaks.get(phase, 0))
        self._close(step, metrics)
        score = found.get("eval/scores")
        best = score is not None and (totals.best_score is None or score > totals.best_score)
        if best:
            totals.best_score = score
        due = config.run.save_every > 0 and step % config.run.save_every == 0
        if last or due or (best and config.run.keep_best > 0):
            self.save(score)
        return metrics

    @property
    def position(self) -> Position:
        """Steps done, and optimizer steps done of the next one."""
        return self.done, 0 if self.partial is None else self.partial.optimizer_steps

    def state(self) -> TrainerState:
        """Return all that `load` needs, beside adapters and heads, to go on from `position` bit for bit."""
        check_finite(self.optimizer, self.parameter_names, f"step={self.done + 1} phase=save")
        return save_state(self, self._sources, time.perf_counter() - self._begun)

    def load(self, state: TrainerState) -> None:
        """Go on from where `state` was taken. Adapters and heads of the model must be those of that moment."""
        load_state(self, state)
        self._sources = capture_sources(self)

    def step(self, step: int) -> dict[str, float | None]:
        """Do one rollout and its updates, or what is left of them; return the metrics.

        Raises:
            NonFiniteError: naming step, phase and quantity.
            RewardError: when a reward source fails.
            OutOfMemory: when one row at a time does not fit.
        """
        metrics = self._advance(step)
        self._close(step, metrics)
        return metrics

    def _advance(self, step: int) -> dict[str, float | None]:
        """Do what is left of a step, but leave it open: an evaluation that is stopped can be done again."""
        if self.partial is None:
            self.partial = self._rollout(step)
            self._sources = capture_sources(self)
        part = self.partial
        metrics = part.metrics | self.update(
            part.experience, train_actor=step > self.config.critic_warmup_steps, step=step, part=part
        )
        part.experience = part.experience.with_tensors(trunk=None)  # large, and of no more use
        return metrics | {"kl_coef": self.kl_coef, "lr": self.schedule.get_last_lr()[0]}

    def _close(self, step: int, metrics: dict[str, float | None]) -> None:
        """Count a step as done."""
        if self.config.kl.adaptive:
            kl = self.config.kl
            self.kl_coef = adaptive_kl_coef(self.kl_coef, metrics["objective/kl"], kl.target, kl.horizon, self._rows)
        self.done, self.partial = step, None
        self._sources = capture_sources(self)

    def _rollout(self, step: int) -> PartialStep:
        """Sample and score one batch of responses; return it with its advantages."""
        rows = next(self.batches)
        experience = self._collect(rows, self.generator, f"step={step}", self._announce)
        raw, shaped = self._score(experience, rows, f"step={step} phase=score")
        if step % self.config.sample_every == 0 or step == 1:
            self.run.samples(step, self._samples(experience, rows, raw))
        metrics = rollout_metrics(experience, raw, shaped, self.kl_coef, self.eos_ids)
        self._check(f"step={step} phase=rollout", metrics)
        with allocating("experience"):
            scores = torch.tensor(shaped, device=self.model.device)
            experience = with_advantages(experience, scores, self.config, self.kl_coef)
        explained = explained_variance(experience.old_values, experience.returns, experience.response_mask)
        return PartialStep(experience, metrics | {"value/explained_variance": explained.item()})

    def update(
        self, experience: Experience, *, train_actor: bool = True, step: int = 0, part: PartialStep | None = None
    ) -> dict[str, float | None]:
        """Run the PPO epochs over one rollout whose advantages and returns are filled in.

        Args:
            part: what was done already; counts on as minibatches are done.
        """
        config = self.config
        part = part or PartialStep(experience)
        self.model.train()
        for number, minibatch in enumerate(experience.minibatches(config.ppo_epochs, config.minibatch_size, self.shuffler)):
            if number < part.optimizer_steps:
                continue
            micro_batches = minibatch.split(self.limits.sizes["microbatch_size"], config.microbatch_tokens)
            self.limits.fit(
                "microbatch_size",
                f"step={step} phase=update",
                lambda rows, minibatch=minibatch: self._minibatch(minibatch, rows, part, train_actor),
                undo=self._drop_gradients,
                most=max(len(rows) for rows in micro_batches),
            )
        # The one wait for the device; what is first not finite is the cause of all that follows.
        policy, value = ([] if not rows else torch.stack(rows).tolist() for rows in (part.actor_stats, part.critic_stats))
        for rows, names in ((policy, POLICY), (value, VALUE)):
            for number, row in enumerate(rows, 1):
                self._check(f"step={step} phase=update, optimizer step {number}", dict(zip(names, row, strict=True)))
        return mean_of(policy, POLICY) | mean_of(value, VALUE) | {"policy/stopped_early": float(part.stopped)}

    def _minibatch(self, minibatch: Experience, microbatch_size: int, part: PartialStep, train_actor: bool) -> None:
        """Take one optimizer step; the result does not depend on the micro-batch size."""
        config, device = self.config, self.model.device
        count = minibatch.response_mask.sum()
        policy, value = torch.zeros(5, device=device), torch.zeros(2, device=device)
        stopped = part.stopped
        for rows in minibatch.split(microbatch_size, config.microbatch_tokens):
            check_stop()
            with allocating("experience"):
                micro = minibatch.select(rows)
            if train_actor and not stopped:
                self._announce("update-actor")
                policy += self.actor_backward(micro, count)
            self._announce("update-critic")
            value += self.critic_backward(micro, count)
        # Reading the KL waits for the device, so only who asks for the early stop pays for it.
        if config.target_kl is not None and train_actor and not stopped and policy[1].item() > config.target_kl:
            stopped = True
            for parameter in self.actor_parameters:
                parameter.grad = None
        self._announce("optimizer")
        norms = self.optimizer_step()
        if train_actor and not stopped:
            part.actor_stats.append(torch.cat([policy, norms[:1]]))
        part.critic_stats.append(torch.cat([value, norms[1:]]))
        part.stopped = stopped
        part.optimizer_steps += 1

    def _drop_gradients(self) -> None:
        """Forget what a failed minibatch left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = fresh_scaler(self.scaler, self.model.device)

    def actor_backward(self, micro: Experience, count: Tensor) -> Tensor:
        """Add the actor's gradients of one micro-batch; return (5,) loss, approx_kl, clip_frac, ratio, entropy."""
        config = self.config
        assert micro.old_logprobs is not None
        assert micro.advantages is not None
        with self.model.role("actor"):
            found = self.model.logprobs(micro.sequences(), config.rollout.temperature, entropy_grad=config.entropy_coef > 0)
            out = policy_loss(
                found.logprobs, micro.old_logprobs, micro.advantages, micro.response_mask, config.clip_range, count
            )
            entropy = masked_mean(found.entropy, micro.response_mask, count)
            loss = out.loss - config.entropy_coef * entropy if config.entropy_coef > 0 else out.loss
            self.scaler.scale(loss).backward()
        return torch.stack([out.loss.detach(), out.approx_kl, out.clip_frac, out.ratio, entropy.detach()])

    def critic_backward(self, micro: Experience, count: Tensor) -> Tensor:
        """Add the critic's gradients of one micro-batch; return (2,) loss, clip_frac."""
        config = self.config
        assert micro.old_values is not None
        assert micro.returns is not None
        with self.model.role("critic"):
            values = self.model.values(micro.sequences())
            out = value_loss(values, micro.old_values, micro.returns, micro.response_mask, config.value_clip_range, count)
            self.scaler.scale(config.vf_coef * out.loss).backward()
        return torch.stack([out.loss.detach(), out.clip_frac])

    def optimizer_step(self) -> Tensor:
        """Clip, step, and return the gradient norms (2,) of actor and critic before the clip."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.max_grad_norm
        norms = torch.stack(
            [clip_gradients(p, limit).to(self.model.device) for p in (self.actor_parameters, self.critic_parameters)]
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def _announce(self, phase: str) -> None:
        self.memory(phase)
        self.on_phase(phase)

    # -- around the loop ---------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, Any]:
        """Sample the held-out prompts and score them; {} without held-out prompts.

        Returns:
            eval/scores (mean), eval/kl (nats per response), eval/response_length, eval/eos_rate, eval/repeated_4grams; and
            `scores`, `responses` row by row.
        """
        if not self.eval_prompts:
            return {}
        generator = torch.Generator(self.model.device).manual_seed(EVAL_SEED)
        # A reward function may draw random numbers; training must not depend on when it was last evaluated.
        with random_sources.kept():
            experience = self._collect(self.eval_prompts, generator, f"step={step} evaluation")
            raw, _ = self._score(experience, self.eval_prompts, f"step={step} phase=evaluation", shape=False)
        found = rollout_metrics(experience, raw, raw, 0.0, self.eos_ids)
        return {
            "eval/scores": found["objective/scores"],
            "eval/kl": found["objective/kl"],
            "eval/response_length": found["rollout/response_length"],
            "eval/eos_rate": found["rollout/eos_rate"],
            "eval/repeated_4grams": found["rollout/repeated_4grams"],
            "scores": raw,
            "responses": self._texts(experience),
        }

    def _collect(
        self,
        rows: Sequence[PromptRow],
        generator: torch.Generator,
        where: str,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> Experience:
        return collect_experience(
            self.model,
            [row.ids for row in rows],
            self.config.rollout,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            generator=generator,
            on_phase=on_phase,
            sampler=self.sampler,
            limits=self.limits,
            where=where,
        )

    def rollout_settings(self) -> RolloutSettings:
        """Return the rollout's settings as far as they fit into memory."""
        return replace(self.config.rollout, score_batch_size=self.limits.sizes["rollout.score_batch_size"])

    @property
    def _rows(self) -> int:
        """Responses of a step."""
        return self.config.rollout.batch_size

    def _score(
        self, experience: Experience, rows: Sequence[PromptRow], where: str, shape: bool = True
    ) -> tuple[list[float], list[float]]:
        """Return raw scores and those that PPO sees."""
        assert experience.scores is not None
        raw = self.scorer.raw(experience.scores.tolist(), [row.text for row in rows], self._texts(experience), where)
        return raw, self.scorer.shape(raw, experience.ended(self.eos_ids)) if shape else raw

    def _texts(self, experience: Experience) -> list[str]:
        return self.tokenizer.batch_decode(experience.responses(), skip_special_tokens=True)

    def _samples(self, experience: Experience, rows: Sequence[PromptRow], scores: Sequence[float]) -> list[dict[str, Any]]:
        texts = self._texts(experience)
        return [
            {"prompt": row.text, "response": text, "score": score} for row, text, score in zip(rows, texts, scores, strict=True)
        ][: self.config.minibatch_size]

    def _throughput(self, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
        return {
            "time/seconds": seconds,
            "time/responses_per_second": self._rows / seconds,
            "time/tokens_per_second": self._rows * metrics["rollout/response_length"] / seconds,
        }

    def _check(self, where: str, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            overflow = name.endswith("grad_norm") and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            if value is not None and not math.isfinite(value) and not overflow:
                raise NonFiniteError(
                    f"{where}: {name} is {value}; lower optimizer.learning_rate or use a wider model.dtype. "
                    "The last checkpoint is intact."
                )


def with_advantages(experience: Experience, scores: Tensor, config: PPOConfig, kl_coef: float) -> Experience:
    """Fill in advantages and returns, both (B, R), from scores (B,) and the rollout's log-probs and values."""
    assert experience.old_logprobs is not None
    assert experience.ref_logprobs is not None
    assert experience.old_values is not None
    mask = experience.response_mask
    rewards = kl_penalised_rewards(scores, experience.old_logprobs, experience.ref_logprobs, mask, kl_coef, config.kl.estimator)
    advantages, returns = gae(rewards, experience.old_values, mask, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return experience.with_tensors(advantages=advantages, returns=returns)


def optimizer_steps(config: PPOConfig) -> int:
    """Return the optimizer steps of a run."""
    return config.steps * config.ppo_epochs * (config.rollout.batch_size // config.minibatch_size)


def end_tokens(model: HydraModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: the tokenizer's, and those of the model's generation config."""
    configured = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    found = sorted({i for i in ids if i is not None})
    if not found:
        raise ConfigError("tokenizer.eos_token=None leaves responses without an end; set eos_token in tokenizer_config.json.")
    return found
