"""Proximal policy optimisation with all four roles on one base.

A step, in order:

1. sample a response to each prompt (actor), then score it: one LoRA-off pass (reference, reward), one critic pass
2. rewards: per-token KL penalty, the score at the last token
3. advantages by GAE, whitened over the rollout
4. the updates: see `ppo_update`

Sources: Schulman et al. 2017 (arXiv 1707.06347); Ziegler et al. 2019 (arXiv 1909.08593); Santacroce et al. 2023
(arXiv 2309.00754), section 3.2. Departure: the rollout's log-probs are recomputed for the update only where that is asked for.

The device is waited for at the sampler, which decides the lengths, and once a step for the metrics; in a rollout with
`advantage: reinforce` or `variance_increase` once more, for what is kept on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hydra_ppo.algorithms.penalties import adaptive_kl_coef
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.data.rows import PreferenceRow, PromptRow
from hydra_ppo.data.text import unknown_ids
from hydra_ppo.errors import ConfigError, ServerError
from hydra_ppo.experience import Experience, FinishedExperience, ScoredExperience
from hydra_ppo.model.answers import end_tokens, settle_ends
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.manifest import UNTRAINED_HEAD
from hydra_ppo.model.origin import origin_of
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.rewards.ensembles import check_aggregates
from hydra_ppo.rewards.scorer import Scorer, Scores, check_origins
from hydra_ppo.rollout.collect import Passes, collect_experience
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.runs.checkpoint import Position, TrainerState
from hydra_ppo.runtime import random_sources
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.host_memory import keep_freed_memory
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.runtime.memory import PhaseMemory
from hydra_ppo.runtime.recorder import Recorder, Silent
from hydra_ppo.training.held_out import compare_judged, evaluation, held_out_samples, numbers_of
from hydra_ppo.training.in_step import end_step, keep_in_step
from hydra_ppo.training.metrics import Metrics, measured
from hydra_ppo.training.optim import check_finite, state_tensors
from hydra_ppo.training.ppo_advantages import with_advantages
from hydra_ppo.training.ppo_begin import begin, check_given
from hydra_ppo.training.ppo_metrics import compare, reward_metrics, rollout_metrics, value_metrics
from hydra_ppo.training.ppo_reading import Reading
from hydra_ppo.training.ppo_state import PartialStep
from hydra_ppo.training.ppo_update import Updates, check_measured
from hydra_ppo.training.practice import Practising, check_practice
from hydra_ppo.training.response_metrics import shape_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_SEED = 1_000_003  # of held-out prompts, so that evaluations differ by the policy alone


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
        world: the processes that train together. All hold what is trained, the optimizer and the whole rollout; rank 0 writes.
        ptx, rehearsal: rows whose chosen answers are practised, see `practice`; both or neither as the settings say.

    Attributes:
        progress: what the run has come to.
        steps: of the whole run.
        stopped_by: the alarm that ended the run before its last step, as `monitor.stop_on_alarm` says; None where none did.
        updates: the updates of a step.

    Memory: beyond the model, gradients and moments (see `optim.build_optimizer`) of the two adapters and the value head.
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
        world: World = ALONE,
        ptx: Sequence[PreferenceRow] = (),
        rehearsal: Sequence[PreferenceRow] = (),
    ) -> None:
        check_given(model, config, prompts, world)
        keep_freed_memory(model.device)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.prompts, self.eval_prompts = list(prompts), list(eval_prompts)[: config.eval_prompts]
        self.steps = config.total_steps(len(self.prompts))
        self.run = run or Silent()
        self.save, self.sampler, self.on_phase, self.world = save, sampler, on_phase, world
        model.bound_values(config.value_range)
        keep_in_step(world, model)
        scorer = Scorer(config.reward, model.device, asks=world.is_main)
        self.judges = None if config.evaluators is None else Scorer(config.evaluators, model.device, asks=world.is_main)
        if self.judges is not None and not self.eval_prompts:
            raise ConfigError("eval_rewards judge answers to held-out prompts, and there are none; give some.")
        asked = [scorer, *([] if self.judges is None else [self.judges])]
        reads_head = any(one.needs_head for one in asked)
        if reads_head and not model.reward_head_trained:
            raise ConfigError(UNTRAINED_HEAD)
        check_aggregates(config.reward, model.reward_heads)
        for one, held in ((scorer, self.prompts), *((one, self.eval_prompts) for one in asked)):
            one.check([row.columns for row in held])
        self.eos_ids = end_tokens(model, tokenizer, config.data.end_of_turn)
        settle_ends(model, tokenizer, self.eos_ids, reads_head=reads_head)
        self._reads_states = check_origins(asked, lambda: origin_of(model, self.eos_ids[0]))
        self.practised = check_practice(config, ptx, rehearsal, model.reward_head_trained)
        self.reading = Reading(tokenizer, config, self.eos_ids)
        self.never = unknown_ids(tokenizer, model.architecture.output_embeddings.weight.shape[0])
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_ids[0]
        self.memory = PhaseMemory(model, model.device, config.run.memory)
        self.progress = begin(
            model, config, self.prompts, scorer, max(len(self.eval_prompts), self._rows), lambda text: self.run.note(text)
        )
        self.stopped_by: str | None = None
        self.updates = Updates(model, config, self.progress, self._announce, world)
        self._begun = time.perf_counter()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run the steps that are left and return the summary: steps, seconds, responses per second, before and after.

        Raises:
            StopRequested, ServerError: on a wish to stop, and where no server samples any more, after `save` was called.
        """
        progress, totals = self.progress, self.progress.totals
        try:
            if totals.before is None:
                totals.before = totals.after = self.evaluate(0)
                progress.watch.look(self.config.monitor, 0, {}, totals.before, self._rows)
            if self.sampled == 0:  # else the run's folder has it already
                self._record(0, numbers_of(totals.before), totals.before)
            with self.run.progress(self.steps, "PPO") as advance:
                advance(progress.done, "")
                while progress.done < self.steps and self.stopped_by is None:
                    metrics = self._whole_step(progress.done + 1)
                    advance(1, f"score {metrics['objective/scores']:.3f}  KL {metrics['objective/kl']:.2f}")
        except (StopRequested, ServerError):
            # The gradients of the minibatch that was begun go; it is done again. Parameters are those of the last step.
            progress.optimizer.zero_grad(set_to_none=True)
            self.save(None)
            raise
        return {
            "steps": progress.done,
            "seconds": totals.seconds,
            "responses_per_second": totals.responses / totals.seconds,
            "peak_bytes": max(totals.peaks.values(), default=None),
            "phase_peak_bytes": totals.peaks or None,
            **compare(totals.before, totals.after),
            **compare_judged(totals.before, totals.after),
            "alarms": progress.watch.raised,
            "stopped_by": self.stopped_by,
        }

    def _whole_step(self, step: int) -> Metrics:
        """Do a step, evaluate, log and save where due."""
        config, progress, totals = self.config, self.progress, self.progress.totals
        self._begun = time.perf_counter()
        with self.memory.step(step - 1, state_tensors(progress.optimizer)):
            metrics = self._advance(step)
        assert progress.partial is not None
        seconds = progress.partial.seconds + time.perf_counter() - self._begun
        metrics |= self._throughput(metrics, seconds) | self.memory.metrics()
        metrics |= end_step(self.world, self.updates.trained, f"step={step}")
        last = step == self.steps
        scheduled = config.eval_every > 0 and step % config.eval_every == 0
        found = self.evaluate(step) if last or scheduled else {}
        metrics |= numbers_of(found)
        watch = progress.watch.copy()  # what a stop during the evaluation below must not have seen twice
        alarms = watch.look(config.monitor, step, metrics, found, self._rows, keep=scheduled)
        stops = [alarm.name for alarm in alarms if config.monitor.stops_at(alarm.name) and not last]
        if config.monitor.stop_on_alarm:
            self.stopped_by = self.world.from_main(lambda: stops[0] if stops else None, f"step={step} alarms")
        if self.stopped_by is not None and not found:
            found = self.evaluate(step)
            metrics |= numbers_of(found)
        if config.monitor.enabled:
            metrics["alarms"] = float(len(watch.on))
        if found or alarms or last or step % config.run.log_every == 0:
            self._record(step, metrics, found)
        for alarm in alarms:
            self.run.alarm(step, alarm.name, alarm.line, alarm.values)

        progress.watch = watch
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
        if last or due or self.stopped_by is not None or (best and config.run.keep_best > 0):
            self.save(score)
        return metrics

    def _record(self, step: int, metrics: Metrics, found: Mapping[str, Any]) -> None:
        """Log what a step is measured by, and samples of its evaluation."""
        if metrics:
            self.run.log(step, metrics)
        if samples := held_out_samples(found, [row.text for row in self.eval_prompts], self.config.minibatch_size):
            self.run.samples(step, samples)

    @property
    def position(self) -> Position:
        """Steps done, and optimizer steps done of the next one."""
        return self.progress.position

    @property
    def sampled(self) -> int:
        """Steps sampled: a rollout that is kept is not sampled again, also where none of its optimizer steps is done."""
        return self.progress.done + (self.progress.partial is not None)

    def state(self) -> TrainerState:
        """Return all that `load` needs, beside adapters and heads, to go on from `position` bit for bit."""
        progress = self.progress
        check_finite(progress.optimizer, progress.names, f"step={progress.done + 1} phase=save")
        return progress.save(time.perf_counter() - self._begun)

    def load(self, state: TrainerState) -> None:
        """Go on from where `state` was taken. Adapters and heads of the model must be those of that moment."""
        self.progress.load(state, self.model, self.config.rollout)

    def step(self, step: int) -> Metrics:
        """Do one rollout and its updates, or what is left of them; return the metrics.

        Raises:
            NonFiniteError: naming step, phase and quantity.
            RewardError: when a reward source fails.
            OutOfMemory: when one row at a time does not fit.
        """
        metrics = self._advance(step)
        self._close(step, metrics)
        return metrics

    def _advance(self, step: int) -> Metrics:
        """Do what is left of a step, but leave it open: an evaluation that is stopped can be done again."""
        progress = self.progress
        if self.updates.practising is None:
            actor = self.updates.parameters["actor"]
            practising = Practising(self.practised, self.model, progress, self.world, actor, self.config, self.pad_id)
            practising.begin(self.eos_ids, self._announce, self.run.note)
            self.updates.practising = practising
        if progress.partial is None:
            progress.partial = self._rollout(step)
            progress.capture()
        part = progress.partial
        metrics = part.metrics | self.updates.run(part, train_actor=step > self.config.critic_warmup_steps, step=step)
        part.experience = part.experience.with_trunk(None)  # large, and of no more use
        return metrics | {"kl_coef": progress.kl_coef, "lr": float(progress.schedule.get_last_lr()[0])}

    def _close(self, step: int, metrics: Metrics) -> None:
        """Count a step as done."""
        progress, kl = self.progress, self.config.kl
        if kl.adaptive:
            found = measured(metrics, "objective/kl")
            progress.kl_coef = adaptive_kl_coef(progress.kl_coef, found, kl.target, kl.horizon, self._rows)
        progress.done, progress.partial = step, None
        progress.capture()

    def _rollout(self, step: int) -> PartialStep:
        """Sample and score one batch of responses; return it with its advantages."""
        progress = self.progress
        rows = next(progress.batches)
        experience = self._collect(rows, progress.sampler, f"step={step}", self._announce)
        found = self._asked(progress.scorer, experience, rows, f"step={step} phase=score")
        ended = self.reading.ended(experience)
        shaped = progress.scorer.shape(found.total, ended)
        if step % self.config.sample_every == 0 or step == 1:
            self.run.samples(step, self.reading.samples(experience, rows, found, self.config.minibatch_size))
        cap, estimator = self.config.rollout.weight_cap, self.config.kl.estimator
        metrics = rollout_metrics(experience, found.total, shaped, progress.kl_coef, self.eos_ids, cap, estimator)
        metrics |= reward_metrics(found.parts)
        most = self.config.rollout.max_new_tokens
        metrics |= shape_metrics(experience, found.total, ended, self.eos_ids, most, self._decoded_together)
        check_measured(f"step={step} phase=rollout", metrics, progress.scaler)
        with allocating("experience"):
            scores = torch.tensor(shaped, device=self.model.device)
            warming_up = step <= self.config.critic_warmup_steps
            finished = with_advantages(experience, scores, self.config, progress.kl_coef, progress.running, ended, warming_up)
        return PartialStep(finished, metrics | value_metrics(finished, self.config.has_critic))

    def update(self, experience: FinishedExperience, *, train_actor: bool = True, step: int = 0) -> Metrics:
        """Run the PPO epochs over one rollout."""
        return self.updates.run(PartialStep(experience), train_actor=train_actor, step=step)

    def _announce(self, phase: str) -> None:
        self.memory(phase)
        self.on_phase(phase)

    # -- around the loop ---------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> dict[str, Any]:
        """Sample the held-out prompts and score them, by `held_out.evaluation`; {} without held-out prompts."""
        if not self.eval_prompts:
            return {}
        generator = torch.Generator(self.model.device).manual_seed(EVAL_SEED)
        # A reward function may draw random numbers; training must not depend on when it was last evaluated.
        with random_sources.kept():
            experience = self._collect(self.eval_prompts, generator, f"step={step} evaluation")
            where, rows = f"step={step} phase=evaluation", self.eval_prompts
            scores = self._asked(self.progress.scorer, experience, rows, where)
            judges = None if self.judges is None else self._asked(self.judges, experience, rows, where)
        ended, texts = self.reading.ended(experience), self.reading.read(experience)
        longest = self.config.rollout.max_new_tokens
        return self._evaluate_ema(step) | evaluation(experience, scores, judges, ended, texts, self.eos_ids, longest)

    def _evaluate_ema(self, step: int) -> dict[str, Any]:
        """Return eval/ema_scores and eval/ema_kl of the running mean of the actor, where there is one."""
        if self.config.ema_decay is None:
            return {}
        generator = torch.Generator(self.model.device).manual_seed(EVAL_SEED)
        where = f"step={step} evaluation of actor_ema"
        with random_sources.kept():
            experience = self._collect(self.eval_prompts, generator, where, role="actor_ema")
            raw = self._asked(self.progress.scorer, experience, self.eval_prompts, where).total
        found = rollout_metrics(experience, raw, raw, 0.0, self.eos_ids)
        return {"eval/ema_scores": found["objective/scores"], "eval/ema_kl": found["objective/kl"]}

    def _collect(
        self,
        rows: Sequence[PromptRow],
        generator: torch.Generator,
        where: str,
        on_phase: Callable[[str], None] = lambda phase: None,
        role: str = "actor",
    ) -> ScoredExperience:
        config = self.config
        return collect_experience(
            self.model,
            [row.ids for row in rows],
            config.rollout,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            generator=generator,
            on_phase=on_phase,
            sampler=self.sampler if role == "actor" else partial(sample, role=role),
            limits=self.progress.limits,
            where=where,
            never=self.never,
            stopped=self.reading.stop,
            world=self.world,
            passes=Passes(role, config.has_critic, config.bootstrap_truncated, self._reads_states),
        )

    @property
    def _rows(self) -> int:
        """Responses of a step."""
        return self.config.rollout.batch_size

    def _asked(self, scorer: Scorer, experience: ScoredExperience, rows: Sequence[PromptRow], where: str) -> Scores:
        """Return what sources say; rank 0 asks them."""
        given, read, others = experience.scores.tolist(), self.reading.responses, (experience.members, experience.features)
        return self.world.from_main(lambda: scorer.score(given, read(experience, rows), where, *others), where)

    @property
    def _decoded_together(self) -> int | None:
        """Rows of a decode batch; None where another sampler decides."""
        if getattr(self.sampler, "func", self.sampler) is not sample:
            return None
        size = min(self.progress.limits.sizes["rollout.generation_batch_size"], self._rows)
        return self.world.rows_at_once(self._rows, size)

    def _texts(self, experience: Experience, show: bool = False, ends: Sequence[int] = ()) -> list[str]:
        return self.reading.texts(experience, show, ends)

    def _throughput(self, metrics: Metrics, seconds: float) -> Metrics:
        return {
            "time/seconds": seconds,
            "time/responses_per_second": self._rows / seconds,
            "time/tokens_per_second": self._rows * measured(metrics, "rollout/response_length") / seconds,
        }
