"""What a PPO run has come to, so that it can stop between two micro-steps and go on as if it had not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hydra_ppo.data.rows import PromptRow
from hydra_ppo.experience import Experience
from hydra_ppo.rewards.scorer import RunningMoments
from hydra_ppo.rollout.collect import score
from hydra_ppo.runs.checkpoint import TrainerState
from hydra_ppo.runtime import random_sources
from hydra_ppo.training.optim import load_optimizer, save_optimizer

if TYPE_CHECKING:
    from hydra_ppo.training.ppo import PPOTrainer


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
        optimizer_steps: done so far.
        actor_stats, critic_stats: of each; rows of `ppo_metrics.POLICY` and `VALUE`.
        stopped: whether the actor passed its target KL.
        seconds: spent on the step by processes before this one.
    """

    experience: Experience
    metrics: dict[str, float | None] = field(default_factory=dict)
    optimizer_steps: int = 0
    actor_stats: list[Tensor] = field(default_factory=list)
    critic_stats: list[Tensor] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0


@dataclass
class Totals:
    """What a run adds up over its steps, and what it was before and after."""

    responses: int = 0
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    after: dict[str, Any] = field(default_factory=dict)
    best_score: float | None = None


def capture_sources(trainer: PPOTrainer) -> TrainerState:
    """Return all that a step changes beside parameters and optimizer: random sources, prompts left, running statistics."""
    tensors, randoms = random_sources.capture({"sampler": trainer.generator, "shuffler": trainer.shuffler})
    values = {
        "random": randoms,
        "pending": list(getattr(trainer.batches, "pending", [])),
        "kl_coef": trainer.kl_coef,
        "moments": asdict(trainer.scorer.moments),
    }
    return TrainerState(tensors, values)


def save_state(trainer: PPOTrainer, sources: TrainerState, seconds: float) -> TrainerState:
    """Return the state of a run that stands where `sources` were captured, parameters as of the last optimizer step.

    Args:
        sources: from the start of the step, or from the start of its updates where those have begun.
        seconds: spent on the step so far.
    """
    optimizer, schedule = save_optimizer(trainer.optimizer, trainer.schedule, trainer.parameter_names)
    tensors = {f"optimizer.{k}": v for k, v in optimizer.items()} | {f"random.{k}": v for k, v in sources.tensors.items()}
    values: dict[str, Any] = {
        "done": trainer.done,
        "sources": sources.values,
        "schedule": schedule,
        "scaler": trainer.scaler.state_dict(),
        "totals": asdict(trainer.totals),
        "limits": trainer.limits.sizes,
        "partial": None,
    }
    if (part := trainer.partial) is not None:
        found, lengths = _pack(part.experience)
        tensors |= {f"experience.{name}": tensor for name, tensor in found.items()}
        values["partial"] = {
            "lengths": lengths,
            "metrics": part.metrics,
            "optimizer_steps": part.optimizer_steps,
            "actor_stats": [row.tolist() for row in part.actor_stats],
            "critic_stats": [row.tolist() for row in part.critic_stats],
            "stopped": part.stopped,
            "seconds": part.seconds + seconds,
        }
    return TrainerState(tensors, values)


def load_state(trainer: PPOTrainer, state: TrainerState) -> None:
    """Bring a fresh trainer, whose model holds the saved adapters and heads, to a saved state."""
    values, tensors = state.values, state.groups()
    load_optimizer(
        trainer.optimizer, trainer.schedule, trainer.parameter_names, tensors.get("optimizer", {}), values["schedule"]
    )
    trainer.scaler.load_state_dict(values["scaler"])
    trainer.done = values["done"]
    trainer.totals = Totals(**values["totals"])
    trainer.limits.sizes |= values["limits"]
    sources = values["sources"]
    trainer.kl_coef = sources["kl_coef"]
    trainer.scorer.moments = RunningMoments(**sources["moments"])
    trainer.batches.pending = list(sources["pending"])
    trainer.partial = _partial(trainer, values["partial"], tensors.get("experience", {}))
    # Last, since what comes before may draw random numbers.
    generators = {"sampler": trainer.generator, "shuffler": trainer.shuffler}
    random_sources.restore(tensors["random"], sources["random"], generators)


def _partial(trainer: PPOTrainer, saved: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> PartialStep | None:
    if saved is None:
        return None
    device = trainer.model.device
    experience = Experience(**{name: tensor.to(device) for name, tensor in tensors.items()}, **saved["lengths"])
    if trainer.model.trunk is not None:  # large, and what the same pass gives again
        again = score(trainer.model, experience, trainer.rollout_settings())
        experience = experience.with_tensors(trunk=again.trunk)
    stats = {name: [torch.tensor(row, device=device) for row in saved[name]] for name in ("actor_stats", "critic_stats")}
    kept = {name: saved[name] for name in ("metrics", "optimizer_steps", "stopped", "seconds")}
    return PartialStep(experience, **kept, **stats)


def _pack(experience: Experience) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return the tensors of an experience but for the trunk, and its lengths."""
    values = {item.name: getattr(experience, item.name) for item in fields(experience)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name != "trunk"}
    return tensors, {name: values[name] for name in ("prompt_lengths", "response_lengths")}
