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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydra_ppo.announce import allocating
from hydra_ppo.config import PPOConfig
from hydra_ppo.data import PromptRow
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
from hydra_ppo.memory import PhaseMemory
from hydra_ppo.model import HydraModel
from hydra_ppo.optim import build_optimizer, clip_gradients, state_tensors
from hydra_ppo.recorder import Recorder, Silent
from hydra_ppo.rewards import Scorer
from hydra_ppo.rollout import collect_experience
from hydra_ppo.sampling import Samples, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_SEED = 1_000_003
"""Held-out prompts are sampled with this seed, so that evaluations differ by the policy alone."""

COMPARED = (
    *("eval_scores_before", "eval_scores_after", "eval_scores_gain_se", "eval_kl"),
    *("eval_repeated_4grams_before", "eval_repeated_4grams_after"),
)


class PPOTrainer:
    """Trains actor and critic of a HydraModel.

    Args:
        model: at stage `ppo`.
        tokenizer: turns responses into text, for reward functions and samples; names the end and pad tokens.
        config: every setting.
        prompts, eval_prompts: tokenised prompts; without eval_prompts nothing is evaluated.
        run: takes metrics, samples and progress.
        save: called with the step number every `config.run.save_every` steps.
        sampler: samples the responses; called as `hydra_ppo.sampling.sample` is.
        on_phase: told rollout, score, update-actor, update-critic and optimizer as they begin.

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
        save: Callable[[int], None] = lambda step: None,
        sampler: Callable[..., Samples] = sample,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        if model.train_stage != "ppo":
            raise ConfigError(f"model is at stage {model.train_stage!r}, PPO needs 'ppo'; build it with train='ppo'.")
        if not prompts:
            raise ConfigError("data.train holds no prompt after the held-out ones are taken; give more rows.")
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
        self.batches = self._prompt_batches()
        minibatches = config.rollout.batch_size // config.minibatch_size
        actor, critic = model.role_parameters("actor"), model.role_parameters("critic")
        rate = config.optimizer.learning_rate
        self.optimizer, self.schedule = build_optimizer(
            [(actor, rate), (critic, config.critic_learning_rate or rate)],
            config.optimizer,
            config.steps * config.ppo_epochs * minibatches,
        )
        self.actor_parameters, self.critic_parameters = list(actor.values()), list(critic.values())
        self.memory = PhaseMemory(model, model.device, config.run.memory)
        # fp16 gradients underflow without a scaled loss; with every other type the scaler does nothing.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.causal_lm.dtype == torch.float16)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run all steps and return the summary: steps, seconds, responses per second, evaluations before and after."""
        started = time.perf_counter()
        before = self.evaluate(0)
        after = before
        totals = {"responses": 0, "seconds": 0.0}
        peaks: dict[str, int] = {}
        with self.run.progress(self.config.steps, "PPO") as advance:
            for step in range(1, self.config.steps + 1):
                begun = time.perf_counter()
                with self.memory.step(step - 1, state_tensors(self.optimizer)):
                    metrics = self.step(step)
                seconds = time.perf_counter() - begun
                metrics |= self._throughput(metrics, seconds) | self.memory.metrics()
                for phase, peak in self.memory.peaks.items():
                    peaks[phase] = max(peak, peaks.get(phase, 0))
                totals = {
                    "responses": totals["responses"] + self.config.rollout.batch_size,
                    "seconds": totals["seconds"] + seconds,
                }
                last = step == self.config.steps
                evaluated = last or (self.config.eval_every > 0 and step % self.config.eval_every == 0)
                if evaluated:
                    after = self.evaluate(step)
                    metrics |= {k: v for k, v in after.items() if not isinstance(v, list)}
                if evaluated or step % self.config.run.log_every == 0:
                    self.run.log(step, metrics)
                if self.config.run.save_every and step % self.config.run.save_every == 0:
                    self.save(step)
                advance(1, f"score {metrics['objective/scores']:.3f}  KL {metrics['objective/kl']:.2f}")
        return {
            "steps": self.config.steps,
            "seconds": time.perf_counter() - started,
            "responses_per_second": totals["responses"] / totals["seconds"],
            "peak_bytes": max(peaks.values(), default=None),
            "phase_peak_bytes": peaks or None,
            **compare(before, after),
        }

    def step(self, step: int) -> dict[str, float | None]:
        """Do one rollout and its updates; return the metrics.

        Raises:
            NonFiniteError: naming step, phase and quantity.
            RewardError: when a reward source fails.
        """
        rows = next(self.batches)
        experience = collect_experience(
            self.model,
            [row.ids for row in rows],
            self.config.rollout,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            generator=self.generator,
            on_phase=self._announce,
            sampler=self.sampler,
        )
        raw, shaped = self._score(experience, rows, f"step={step} phase=score")
        if step % self.config.sample_every == 0 or step == 1:
            self.run.samples(step, self._samples(experience, rows, raw))
        metrics = rollout_metrics(experience, raw, shaped, self.kl_coef, self.eos_ids)
        self._check(step, "rollout", metrics)
        with allocating("experience"):
            scores = torch.tensor(shaped, device=self.model.device)
            experience = with_advantages(experience, scores, self.config, self.kl_coef)
        explained = explained_variance(experience.old_values, experience.returns, experience.response_mask)
        metrics |= self.update(experience, train_actor=step > self.config.critic_warmup_steps, step=step)
        metrics |= {
            "value/explained_variance": explained.item(),
            "kl_coef": self.kl_coef,
            "lr": self.schedule.get_last_lr()[0],
        }
        if self.config.kl.adaptive:
            kl = self.config.kl
            self.kl_coef = adaptive_kl_coef(self.kl_coef, metrics["objective/kl"], kl.target, kl.horizon, len(experience))
        return metrics

    def update(self, experience: Experience, *, train_actor: bool = True, step: int = 0) -> dict[str, float | None]:
        """Run the PPO epochs over one rollout whose advantages and returns are filled in."""
        config, model = self.config, self.model
        model.train()
        actor_stats: list[Tensor] = []
        critic_stats: list[Tensor] = []
        stopped = False
        for minibatch in experience.minibatches(config.ppo_epochs, config.minibatch_size, self.shuffler):
            count = minibatch.response_mask.sum()
            policy = torch.zeros(5, device=model.device)
            value = torch.zeros(2, device=model.device)
            for rows in minibatch.split(config.microbatch_size, config.microbatch_tokens):
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
                actor_stats.append(torch.cat([policy, norms[:1]]))
            critic_stats.append(torch.cat([value, norms[1:]]))
        metrics = _mean_of(
            actor_stats,
            ("policy/loss", "policy/approx_kl", "policy/clip_frac", "policy/ratio", "policy/entropy", "policy/grad_norm"),
        )
        metrics |= _mean_of(critic_stats, ("value/loss", "value/clip_frac", "value/grad_norm"))
        metrics["policy/stopped_early"] = float(stopped)
        self._check(step, "update", metrics)
        return metrics

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
        experience = collect_experience(
            self.model,
            [row.ids for row in self.eval_prompts],
            self.config.rollout,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            generator=generator,
            sampler=self.sampler,
        )
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

    def _prompt_batches(self) -> Iterator[list[PromptRow]]:
        """Yield the prompt of each response of a step, for ever; an epoch's remainder is filled up from the next epoch."""
        copies = self.config.rollout.samples_per_prompt
        size = self.config.rollout.batch_size // copies
        pending: list[int] = []
        while True:
            while len(pending) < size:
                pending += torch.randperm(len(self.prompts), generator=self.shuffler).tolist()
            yield [self.prompts[i] for i in pending[:size] for _ in range(copies)]
            pending = pending[size:]

    def _throughput(self, metrics: dict[str, Any], seconds: float) -> dict[str, float]:
        rows = self.config.rollout.batch_size
        return {
            "time/seconds": seconds,
            "time/responses_per_second": rows / seconds,
            "time/tokens_per_second": rows * metrics["rollout/response_length"] / seconds,
        }

    def _check(self, step: int, phase: str, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            overflow = name.endswith("grad_norm") and self.scaler.is_enabled() and self.scaler.get_scale() >= 1
            if value is not None and not math.isfinite(value) and not overflow:
                raise NonFiniteError(
                    f"step={step} phase={phase}: {name} is {value}; lower optimizer.learning_rate or use a wider model.dtype. "
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


def rollout_metrics(
    experience: Experience, raw: Sequence[float], shaped: Sequence[float], kl_coef: float, eos_ids: Sequence[int]
) -> dict[str, float | None]:
    """Return what the rollout shows, with one wait for the device."""
    assert experience.old_logprobs is not None
    assert experience.ref_logprobs is not None
    assert experience.old_values is not None
    rows = len(experience)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum() / rows
    surprise = -experience.old_logprobs.sum() / rows
    drift = kl.new_zeros(())
    if experience.sampler_logprobs is not None:
        drift = (experience.sampler_logprobs - experience.old_logprobs).abs().max()
    value_mean = masked_mean(experience.old_values, experience.response_mask)
    kl_value, entropy, drift_value, value = torch.stack([kl, surprise, drift, value_mean]).tolist()
    mean = sum(raw) / rows
    return {
        "objective/scores": mean,
        "objective/scores_std": math.sqrt(sum((s - mean) ** 2 for s in raw) / rows),
        "objective/rlhf_reward": sum(shaped) / rows - kl_coef * kl_value,
        "objective/kl": kl_value,
        "objective/entropy": entropy,
        "value/mean": value,
        "rollout/response_length": sum(experience.response_lengths) / rows,
        "rollout/eos_rate": sum(experience.ended(eos_ids)) / rows,
        "rollout/repeated_4grams": repeated_ngrams(experience.responses(), 4),
        "rollout/logprob_drift": drift_value if experience.sampler_logprobs is not None else None,
    }


def repeated_ngrams(responses: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of n-grams that stood in the same response before; a policy that games its reward repeats itself."""
    total = repeated = 0
    for response in responses:
        grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return held-out scores before and after, and the standard error of the mean difference, prompt by prompt."""
    if not before:
        return dict.fromkeys(COMPARED)
    gains = [b - a for a, b in zip(before["scores"], after["scores"], strict=True)]
    mean = sum(gains) / len(gains)
    variance = sum((g - mean) ** 2 for g in gains) / max(len(gains) - 1, 1)
    return {
        "eval_scores_before": before["eval/scores"],
        "eval_scores_after": after["eval/scores"],
        "eval_scores_gain_se": math.sqrt(variance / len(gains)),
        "eval_kl": after["eval/kl"],
        "eval_repeated_4grams_before": before["eval/repeated_4grams"],
        "eval_repeated_4grams_after": after["eval/repeated_4grams"],
    }


def end_tokens(model: HydraModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: the tokenizer's, and those of the model's generation config."""
    configured = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    found = sorted({i for i in ids if i is not None})
    if not found:
        raise ConfigError("tokenizer.eos_token=None leaves responses without an end; set eos_token in tokenizer_config.json.")
    return found


def _mean_of(stats: Sequence[Tensor], names: Sequence[str]) -> dict[str, float | None]:
    """Average per-minibatch statistics, with one wait for the device; None where there were none."""
    if not stats:
        return dict.fromkeys(names)
    return dict(zip(names, torch.stack(list(stats)).mean(dim=0).tolist(), strict=True))
