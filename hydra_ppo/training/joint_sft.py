"""Joint supervised fine-tuning and reward modelling (the paper's Hydra-SFT).

On preference pairs (x, y_w, y_l), one pass over chosen and rejected serves both heads:

    L = sft_coef * mean over tokens of y_w of -log p(token)  +  reward_coef * mean over pairs of -log sigmoid(r_w - r_l).

Source: Santacroce et al. 2023 (arXiv 2309.00754), section 3.1. `reward_coef` = 0 is plain SFT, `sft_coef` = 0 plain reward
modelling; each then makes only the passes that it needs. Other losses of the reward model, several reward heads and floor pairs
(`reward_losses`, `pairs`) are of the same pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.algorithms.calibration import expected_calibration_error, share_right
from hydra_ppo.config.settings import SFTConfig
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.experience import Experience, split_by_length
from hydra_ppo.model.heads import Readings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.dealing import check_divides
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.runs.checkpoint import Position, TrainerState
from hydra_ppo.runtime import random_sources
from hydra_ppo.runtime.exhaustion import Limits
from hydra_ppo.runtime.host_memory import keep_freed_memory
from hydra_ppo.runtime.interruption import StopRequested, check_stop
from hydra_ppo.runtime.memory import PhaseMemory
from hydra_ppo.runtime.recorder import Recorder, Silent
from hydra_ppo.training.in_step import end_step, keep_in_step
from hydra_ppo.training.metrics import Metrics, measured
from hydra_ppo.training.optim import (
    build_optimizer,
    check_finite,
    clip_gradients,
    fresh_scaler,
    load_optimizer,
    save_optimizer,
    state_tensors,
)
from hydra_ppo.training.pairs import PairBatches, longest, real_first
from hydra_ppo.training.reward_losses import along_columns, pair_losses
from hydra_ppo.training.sft_metrics import COUNT, Counts, PairSums, named_sums


class JointSFTTrainer:
    """Trains the reference and reward roles of a HydraModel at stage `sft`, `reward` or `base`.

    Args:
        model: at the stage `config.stage`.
        config: coefficients, batch sizes, optimizer.
        train_rows, eval_rows: tokenised preference pairs; without eval_rows nothing is evaluated and the last model is saved.
        pad_token_id: fills up rows.
        run: takes metrics and progress.
        save_best: called whenever the held-out loss is the best so far; once at the end where there are no held-out pairs.
        save: called where a checkpoint is due, with the negative held-out loss where it was just measured: every
            `config.run.save_every` steps, at a best held-out loss, after the last step and on a wish to stop.
        on_phase: told update and optimizer as they begin.
        world: the processes that train together. All hold what is trained and the optimizer; rank 0 writes.

    Attributes:
        done: steps done.

    Memory: gradients and moments (see `optim.build_optimizer`) of what is trained; activations of 2 * microbatch_size rows, of
    which `reward_loss` divergent has the last once more in fp32.
    """

    def __init__(
        self,
        model: HydraModel,
        config: SFTConfig,
        train_rows: Sequence[PreferenceRow],
        eval_rows: Sequence[PreferenceRow] = (),
        *,
        pad_token_id: int,
        run: Recorder | None = None,
        save_best: Callable[[], None] = lambda: None,
        save: Callable[[float | None], None] = lambda score: None,
        on_phase: Callable[[str], None] = lambda phase: None,
        world: World = ALONE,
    ) -> None:
        stage = config.stage
        if model.train_stage != stage:
            raise ConfigError(
                f"method={config.method!r} with adapter={config.adapter!r} and sft_coef={config.sft_coef:g} needs a model at "
                f"stage {stage!r}, not {model.train_stage!r}; build it with train={stage!r}."
            )
        if not train_rows:
            raise ConfigError("data.train holds no preference pair after the held-out ones are taken; give more rows.")
        check_heads(config, model)
        check_divides(world.size, batch_size=config.batch_size)
        keep_freed_memory(model.device)
        self.model, self.config, self.world = model, config, world
        keep_in_step(world, model)
        self.train_rows, self.eval_rows = list(train_rows), list(eval_rows)[: config.eval_pairs]
        self.pad_token_id = pad_token_id
        self.run = run or Silent()
        self.save_best, self.save, self.on_phase = save_best, save, on_phase
        self.batches = PairBatches(self.train_rows, config)
        self.total_steps = self.batches.steps
        groups = [(model.role_parameters(role), config.optimizer.learning_rate) for role in model.trainable_roles]
        self.parameter_names = {id(p): name for named, _ in reversed(groups) for name, p in named.items()}
        self.optimizer, self.schedule = build_optimizer(groups, config.optimizer, self.total_steps)
        self.memory = PhaseMemory(model, model.device, config.run.memory)
        # fp16 gradients underflow without a scaled loss; with every other type the scaler does nothing.
        half = model.causal_lm.dtype == torch.float16 or model.autocast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=half)

        self.limits = Limits({"microbatch_size": config.microbatch_size}, model.device, lambda text: self.run.note(text))
        self.done = 0
        self._heads_only = False
        self.seconds = 0.0
        self.best: Metrics = {}
        self.best_step: int | None = None

    def train(self) -> dict[str, Any]:
        """Run the steps that are left, with an evaluation before the first; return the summary.

        Returns:
            steps, seconds, the evaluation at the best step, if there was one.

        Raises:
            StopRequested: on a wish to stop, after `save` was called.
        """
        if self.config.reward_coef > 0:
            self.model.reward_head_trained = True
        try:
            with self.run.progress(self.total_steps, "SFT") as advance:
                advance(self.done, "")
                if self.done == 0 and self.eval_rows:
                    self.run.log(0, self.evaluate())
                for rows in self.batches.after(self.done):
                    metrics = self._whole_step(self.done, rows)
                    advance(1, f"loss {metrics['loss/total']:.3f}")
        except StopRequested:
            self.optimizer.zero_grad(set_to_none=True)
            self.save(None)
            raise
        if self.best_step is None:
            self.save_best()
        return {
            "steps": self.total_steps,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "pairs": len(self.train_rows),
            **self.best,
        }

    def _whole_step(self, step: int, rows: Sequence[PreferenceRow]) -> Metrics:
        """Do the step after `step` others, evaluate, log and save where due."""
        begun = time.perf_counter()
        with self.memory.step(step, state_tensors(self.optimizer)):
            metrics = self.step(step, rows)
        self.done = step + 1
        last = self.done == self.total_steps
        evaluated = bool(self.eval_rows) and (last or self.done % self.config.eval_every == 0)
        best = False
        if evaluated:
            metrics |= (found := self.evaluate())
            if best := self.best_step is None or measured(found, "eval/loss") < measured(self.best, "eval/loss"):
                self.best, self.best_step = found, self.done
                self.save_best()
        seconds = time.perf_counter() - begun
        self.seconds += seconds
        metrics |= end_step(self.world, self._parameters, f"step={self.done}")
        if last or evaluated or step % self.config.run.log_every == 0:
            self.run.log(self.done, metrics | self.memory.metrics())
        due = self.config.run.save_every > 0 and self.done % self.config.run.save_every == 0
        if last or due or (best and self.config.run.keep_best > 0):
            self.save(-measured(metrics, "eval/loss") if evaluated else None)
        return metrics

    @property
    def position(self) -> Position:
        """Steps done, and 0: a step here is one optimizer step."""
        return self.done, 0

    @property
    def sampled(self) -> int:
        """Steps done; nothing is sampled."""
        return self.done

    def state(self) -> TrainerState:
        """Return all that `load` needs, beside what is trained, to go on from `position` bit for bit."""
        check_finite(self.optimizer, self.parameter_names, f"step={self.done} phase=save")
        optimizer, schedule = save_optimizer(self.optimizer, self.schedule, self.parameter_names)
        randoms, random_values = random_sources.capture({})
        tensors = {f"optimizer.{k}": v for k, v in optimizer.items()} | {f"random.{k}": v for k, v in randoms.items()}
        values = {
            "done": self.done,
            "seconds": self.seconds,
            "schedule": schedule,
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "best_step": self.best_step,
            "limits": self.limits.sizes,
            "random": random_values,
        }
        return TrainerState(tensors, values)

    def load(self, state: TrainerState) -> None:
        """Go on from where `state` was taken. What is trained must be as it was at that moment."""
        values, tensors = state.values, state.groups()
        load_optimizer(self.optimizer, self.schedule, self.parameter_names, tensors.get("optimizer", {}), values["schedule"])
        self.scaler.load_state_dict(values["scaler"])
        self.done, self.seconds = values["done"], values["seconds"]
        self.best, self.best_step = values["best"], values["best_step"]
        self.limits.sizes |= values["limits"]
        random_sources.restore(tensors["random"], values["random"], {})

    def step(self, step: int, rows: Sequence[PreferenceRow]) -> Metrics:
        """Take one optimizer step; the result does not depend on the micro-batch size.

        Raises:
            NonFiniteError: naming step and quantity, before anything is changed.
            OutOfMemory: when one pair at a time does not fit.
        """
        return self.limits.fit(
            "microbatch_size",
            f"step={step + 1} phase=update",
            lambda size: self._step(step, rows, size),
            undo=self._drop_gradients,
            most=self.world.rows_at_once(len(rows), self.limits.sizes["microbatch_size"]),
        )

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _drop_gradients(self) -> None:
        """Forget what a failed step left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = fresh_scaler(self.scaler, self.model.device)

    def _step(self, step: int, rows: Sequence[PreferenceRow], microbatch_size: int) -> Metrics:
        config, counts = self.config, Counts.of(rows)
        self._heads_only = step < config.floor_steps
        self.model.train()
        totals = torch.zeros(COUNT, device=self.model.device)
        self.scaler.scale(totals)  # which readies it, also where this process has no pair of the last few

        def backward() -> None:
            for group, is_ours in self._share(rows, microbatch_size):
                check_stop()
                self._announce("update")
                sums = self.pass_over([rows[i] for i in group])
                loss = config.sft_coef * sums.nll / max(counts.tokens, 1) + config.reward_coef * sums.ranking / len(rows)
                if sums.expected is not None:
                    loss = loss + config.reward_coef * sums.expected / len(rows)
                self.scaler.scale(loss if is_ours else loss * 0.0).backward()
                if is_ours:
                    totals.add_(sums.vector())

        where = f"step={step + 1} phase=update, microbatch_size={microbatch_size}"
        self.world.together(backward, where)
        self.world.sum_gradients(self._parameters, [totals])
        return self.world.alike(partial(self._optimizer_step, step, totals, counts), where)

    def _share(self, rows: Sequence[PreferenceRow], size: int) -> list[tuple[list[int], bool]]:
        """Return the numbers of the rows of each micro-batch that this process does, and whether it counts."""
        lengths = [longest(row) for row in rows]
        return self.world.share(split_by_length(lengths, size), lambda group: sum(lengths[i] for i in group))

    def _optimizer_step(self, step: int, totals: Tensor, counts: Counts) -> Metrics:
        config = self.config
        self._announce("optimizer")
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self._parameters, config.optimizer.max_grad_norm)
        # The one wait for the device in a step, before anything is changed.
        *sums, norm = torch.cat([totals, grad_norm[None]]).tolist()
        nll, ranking, _, expected = sums[:4]
        for name, value in (("sft", nll), ("reward", ranking), ("expected", expected), ("grad_norm", norm)):
            name = name if name == "grad_norm" else f"loss/{name}"
            if not math.isfinite(value) and not (name == "grad_norm" and self.scaler.is_enabled()):
                raise NonFiniteError(
                    f"step={step + 1} phase=update: {name} is {value}; lower optimizer.learning_rate or look at the data. "
                    "The last saved model is intact."
                )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return named_sums(config, sums, counts, "train") | {"grad_norm": norm, "lr": rate}

    def _announce(self, phase: str) -> None:
        self.memory(phase)
        self.on_phase(phase)

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Return what the held-out pairs show.

        Returns:
            eval/loss; eval/perplexity (per response token, None without SFT); eval/reward_accuracy and eval/reward_ece, the
            calibration error of the probabilities that the scores stand for (None without reward); eval/reward_spread of
            several reward heads.
        """
        self.model.eval()
        rows, config = self.eval_rows, self.config

        def total(size: int) -> tuple[Tensor, Tensor]:
            totals = torch.zeros(COUNT, device=self.model.device)
            margins = torch.zeros(len(rows), device=self.model.device)

            def run() -> None:
                for group, is_ours in self._share(rows, self.world.rows_at_once(len(rows), 4 * size)):
                    found = self.pass_over([rows[i] for i in group])
                    if is_ours:
                        totals.add_(found.vector())
                        if found.margins is not None:
                            margins[torch.tensor(group, device=margins.device)] = found.margins

            self.world.together(run, f"step={self.done} evaluation, {size} at once")
            self.world.sum([totals, margins])
            return totals, margins

        totals, margins = self.limits.fit("microbatch_size", f"step={self.done} evaluation", total, most=len(rows))
        sums, counts, ranked = totals.tolist(), Counts.of(rows), config.reward_coef > 0
        found = named_sums(config, sums, counts, "eval")
        shown = {name: value for name, value in found.items() if name.startswith("eval/")}
        return {
            "eval/loss": found["loss/total"],
            "eval/perplexity": math.exp(min(sums[0] / counts.tokens, 80.0)) if config.sft_coef else None,
            **shown,
            "eval/reward_ece": expected_calibration_error(margins).item() if ranked else None,
        }

    def pass_over(self, rows: Sequence[PreferenceRow]) -> PairSums:
        """Run chosen and rejected responses of the pairs through the base once; return the sums of both losses."""
        config, model = self.config, self.model
        rows, real = real_first(rows)
        ranked = config.reward_coef > 0
        responses = [row.chosen_ids for row in rows] + ([row.rejected_ids for row in rows] if ranked else [])
        prompts = [row.prompt_ids for row in rows] + ([row.before_rejected for row in rows] if ranked else [])
        sequences = Experience.from_lists(prompts, responses, self.pad_token_id, model.device).sequences()
        columns = along_columns(rows, model.device) if config.reward_loss == "divergent" else None
        read = None if columns is None else columns.read
        logprobs: Tensor | None = None
        found: Readings | None = None
        if config.sft_coef > 0 and ranked and real > 0:
            logprobs, found = model.reference_and_readings(sequences, lm_rows=real, columns=read)
        elif ranked:
            with model.role("reward"):  # where all are floor pairs, the heads alone learn
                found = model.readings(sequences, read, heads_only=real == 0 and self._heads_only)
        else:
            with model.role("reference"):
                logprobs = model.logprobs(sequences).logprobs
        nll = zero = torch.zeros((), device=model.device)
        if logprobs is not None:
            nll = -logprobs.masked_fill(~sequences.response_mask[:real], 0.0).sum()
        if found is None:
            return PairSums(nll, zero, zero)
        losses = pair_losses(config, rows, found, columns)
        right = share_right(losses.margins)
        return PairSums(
            nll,
            losses.ranking.sum(),
            right[:real].sum(),
            None if losses.expected is None else losses.expected.sum(),
            losses.spread[:real].sum(),
            right[real:].sum(),
            losses.margins,
        )


def check_heads(config: SFTConfig, model: HydraModel) -> None:
    """Refuse a model whose reward heads are not those that the settings train.

    Raises:
        ConfigError: where they are others in number, or one of the expected reward is missing or left over.
    """
    if config.reward_coef == 0:
        return
    wanted, found = (config.reward_heads, config.reward_loss == "advantage"), (model.reward_heads, model.expects)
    if wanted != found:
        raise ConfigError(
            f"reward_heads={wanted[0]} and reward_loss={config.reward_loss!r} do not fit a model of {found[0]} reward heads "
            f"{'and' if found[1] else 'without'} an expected reward; build it with heads=HeadPlan({wanted[0]}, {wanted[1]})."
        )
