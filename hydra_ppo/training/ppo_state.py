"""What a PPO run has come to, so that it can stop between two micro-steps and go on as if it had not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.data.rows import PromptRow
from hydra_ppo.experience import FinishedExperience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rewards.scorer import RunningMoments, Scorer
from hydra_ppo.rollout.collect import Passes, score
from hydra_ppo.runs.checkpoint import Position, TrainerState
from hydra_ppo.runtime import random_sources
from hydra_ppo.runtime.exhaustion import Limits
from hydra_ppo.training.away import send_away
from hydra_ppo.training.metrics import Metrics
from hydra_ppo.training.monitor import Watch
from hydra_ppo.training.optim import load_optimizer, save_optimizer
from hydra_ppo.training.ppo_advantages import RunningRewards
from hydra_ppo.training.ppo_metrics import POLICY


class PromptBatches:
    """The prompt of each response of a step, for ever; an epoch's remainder is filled up from the next epoch.

    Args:
        prompts: all of them.
        size: prompts of a step.
        copies: responses to each.
        generator: draws the order of each epoch.

    Attributes:
        pending: numbers of the prompts that the epoch has left.
    """

    def __init__(self, prompts: Sequence[PromptRow], size: int, copies: int, generator: torch.Generator) -> None:
        self.prompts, self.size, self.copies, self.generator = prompts, size, copies, generator
        self.pending: list[int] = []

    def __iter__(self) -> Iterator[list[PromptRow]]:
        return self

    def __next__(self) -> list[PromptRow]:
        while len(self.pending) < self.size:
            self.pending += torch.randperm(len(self.prompts), generator=self.generator).tolist()
        chosen, self.pending = self.pending[: self.size], self.pending[self.size :]
        return [self.prompts[i] for i in chosen for _ in range(self.copies)]


@dataclass
class PartialStep:
    """A step whose rollout is done and whose updates are not.

    Attributes:
        experience: advantages and returns filled in.
        metrics: of the rollout.
        optimizer_steps: done so far, by actor and critic.
        actor_stats, critic_stats: of each; rows of `ppo_metrics.POLICY` and `VALUE`.
        practice_stats: cross-entropies of what is practised beside, where something is.
        stopped: whether the actor passed its target KL.
        seconds: spent on the step by processes before this one.
        turns_done: of those of the minibatch that is next; see `ppo_update.turns`.
    """

    experience: FinishedExperience
    metrics: Metrics = field(default_factory=dict)
    optimizer_steps: int = 0
    actor_stats: list[Tensor] = field(default_factory=list)
    critic_stats: list[Tensor] = field(default_factory=list)
    practice_stats: list[Tensor] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0
    turns_done: int = 0


@dataclass
class Totals:
    """What a run adds up over its steps, and what it was before and after."""

    responses: int = 0
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    after: dict[str, Any] = field(default_factory=dict)
    best_score: float | None = None


@dataclass
class PPOState:
    """All that a run changes beside adapters and heads.

    Attributes:
        optimizer, schedule, scaler: of actor and critic.
        names: of the trained parameters, by id.
        limits: how much is computed at once.
        sampler, shuffler: draw tokens, and the order of rows.
        batches: gives the prompts of each step.
        scorer: keeps running statistics of the scores.
        kl_coef: as it is now.
        running: what rewards were so far.
        rehearsed: numbers of the rows that are rehearsed; None before they are selected.
        done: steps done.
        partial: the step that is being updated on, None outside of the updates.
        totals: sums over the steps done.
        watch: the history that alarms look back over.
        sources: what `capture` found when the step began, or its updates where those have begun.
        moments_leave: the optimizer's state is in host memory outside of the updates.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    names: Mapping[int, str]
    limits: Limits
    sampler: torch.Generator
    shuffler: torch.Generator
    batches: Iterator[list[PromptRow]]
    scorer: Scorer
    kl_coef: float
    running: RunningRewards = field(default_factory=RunningRewards)
    rehearsed: list[int] | None = None
    done: int = 0
    partial: PartialStep | None = None
    totals: Totals = field(default_factory=Totals)
    watch: Watch = field(default_factory=Watch)
    sources: TrainerState = field(default_factory=TrainerState)
    moments_leave: bool = False

    @property
    def position(self) -> Position:
        """Steps done, and optimizer steps done of the next one."""
        return self.done, 0 if self.partial is None else self.partial.optimizer_steps

    def capture(self) -> None:
        """Note all that a step changes beside parameters and optimizer: random sources, prompts left, running statistics."""
        tensors, randoms = random_sources.capture(self._generators())
        values = {
            "random": randoms,
            "pending": list(self.batches.pending) if isinstance(self.batches, PromptBatches) else [],
            "kl_coef": self.kl_coef,
            "moments": asdict(self.scorer.moments),
        }
        if self.running != RunningRewards():  # `resume.SINCE` reaches what stands at the top alone
            values["running"] = asdict(self.running)
        self.sources = TrainerState(tensors, values)

    def _generators(self) -> dict[str, torch.Generator]:
        return {"sampler": self.sampler, "shuffler": self.shuffler}

    def save(self, seconds: float) -> TrainerState:
        """Return the state of a run that stands where `capture` was called, parameters as of the last optimizer step.

        Args:
            seconds: spent on the step so far.
        """
        optimizer, schedule = save_optimizer(self.optimizer, self.schedule, self.names)
        tensors = {f"optimizer.{k}": v for k, v in optimizer.items()}
        tensors |= {f"random.{k}": v for k, v in self.sources.tensors.items()}
        values: dict[str, Any] = {
            "done": self.done,
            "sources": self.sources.values,
            "schedule": schedule,
            "scaler": self.scaler.state_dict(),
            "totals": asdict(self.totals),
            "watch": self.watch.save(),
            "limits": self.limits.sizes,
            "partial": None,
        }
        if self.rehearsed is not None:  # which earlier checkpoints do not have
            values["rehearsed"] = self.rehearsed
        if (part := self.partial) is not None:
            found, lengths = _pack(part.experience)
            tensors |= {f"experience.{name}": tensor for name, tensor in found.items()}
            values["partial"] = {
                "lengths": lengths,
                "metrics": part.metrics,
                "optimizer_steps": part.optimizer_steps,
                "actor_stats": [row.tolist() for row in part.actor_stats],
                "critic_stats": [row.tolist() for row in part.critic_stats],
                "practice_stats": [row.tolist() for row in part.practice_stats],
                "stopped": part.stopped,
                "seconds": part.seconds + seconds,
                "turns_done": part.turns_done,
            }
        return TrainerState(tensors, values)

    def load(self, saved: TrainerState, model: HydraModel, rollout: RolloutSettings) -> None:
        """Bring the state of a fresh run to a saved one.

        Args:
            model: holds the saved adapters and heads.
            rollout: as the run has it; its score_batch_size gives way to what has fitted into memory.
        """
        values, tensors = saved.values, saved.groups()
        load_optimizer(self.optimizer, self.schedule, self.names, tensors.get("optimizer", {}), values["schedule"])
        if self.moments_leave:
            send_away(self.optimizer)
        self.scaler.load_state_dict(values["scaler"])
        self.done, self.rehearsed = values["done"], values.get("rehearsed")
        self.totals = Totals(**values["totals"])
        self.watch = Watch.load(values["watch"])
        self.limits.sizes |= values["limits"]
        sources = values["sources"]
        self.kl_coef = sources["kl_coef"]
        self.scorer.moments = RunningMoments(**sources["moments"])
        self.running = RunningRewards(**sources.get("running", {}))
        if isinstance(self.batches, PromptBatches):
            self.batches.pending = list(sources["pending"])
        fitting = replace(rollout, score_batch_size=self.limits.sizes["rollout.score_batch_size"])
        self.partial = _partial(model, fitting, values["partial"], tensors.get("experience", {}))
        # Last, since what comes before may draw random numbers.
        random_sources.restore(tensors["random"], sources["random"], self._generators())
        self.capture()


def _partial(
    model: HydraModel, rollout: RolloutSettings, saved: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> PartialStep | None:
    if saved is None:
        return None
    parts: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    experience = FinishedExperience(**parts, **saved["lengths"])
    if model.trunk is not None:  # large, and what the same pass gives again
        passes = ("score_batch_size", "temperature", "trunk_cache")  # and nothing is recomputed or measured again
        plain = replace(RolloutSettings(), **{name: getattr(rollout, name) for name in passes})
        had = Passes(critic="critic" in model.roles)
        experience = experience.with_trunk(score(model, experience, experience.old_logprobs, plain, passes=had).trunk)
    return PartialStep(
        experience,
        metrics=saved["metrics"],
        optimizer_steps=saved["optimizer_steps"],
        # Checkpoints of before there was a largest ratio have rows without; 0 is never the largest.
        actor_stats=[torch.tensor([*row, 0.0][: len(POLICY)], device=model.device) for row in saved["actor_stats"]],
        critic_stats=[torch.tensor(row, device=model.device) for row in saved["critic_stats"]],
        practice_stats=[torch.tensor(row, device=model.device) for row in saved.get("practice_stats", [])],
        stopped=saved["stopped"],
        seconds=saved["seconds"],
        # Earlier checkpoints say whether the actor is done, those of before there was an order nothing.
        turns_done=saved.get("turns_done", int(saved.get("actor_done", False))),
    )


def _pack(experience: FinishedExperience) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return the tensors of an experience but for the trunk, and its lengths."""
    values = experience.parts()
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name != "trunk"}
    return tensors, {name: values[name] for name in ("prompt_lengths", "response_lengths")}
