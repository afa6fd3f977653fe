"""What the actor practises beside PPO: answers that it goes on learning, so that it does not forget them.

Two kinds. *ptx* (Ouyang et al. 2022, arXiv 2203.02155, equation 2; DeepSpeed-Chat, arXiv 2308.01320): all of the answers, with
a gradient whose length is a given part of PPO's own, so that neither's scale matters. *Selective rehearsal* (Peng et al. 2023,
arXiv 2309.10202, section 3): of each kind of answer the best, with a fixed weight of their cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydra_ppo.algorithms.clusters import best_of_each, kmeans
from hydra_ppo.algorithms.masked import masked_mean
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.manifest import UNSCORED
from hydra_ppo.parallel.world import World
from hydra_ppo.rollout.scoring import scores_and_means
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.interruption import check_stop
from hydra_ppo.training.ppo_state import PPOState


@dataclass(frozen=True)
class Practice:
    """Answers that are practised.

    Attributes:
        name: ptx or rehearsal.
        prompts, answers: token ids.
        coef: weight of the mean cross-entropy; where `is_relative`, length of its gradient in lengths of PPO's.
        batch_size: answers of an optimizer step.

    Memory: token ids; while an optimizer step gathers its gradients, those of the actor's adapter a second time.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    coef: float
    is_relative: bool
    batch_size: int

    def draw(self, seed: int, step: int, number: int, pad_id: int, device: torch.device) -> Experience:
        """Return the answers of an optimizer step, which depend on nothing but the arguments: no state to be resumed."""
        generator = torch.Generator().manual_seed(seed + 1_000_003 * step + 10_007 * number)
        count = len(self.answers)
        if self.batch_size <= count:
            rows = torch.randperm(count, generator=generator)[: self.batch_size].tolist()
        else:
            rows = torch.randint(count, (self.batch_size,), generator=generator).tolist()
        return Experience.from_lists([self.prompts[i] for i in rows], [self.answers[i] for i in rows], pad_id, device)


class Practising:
    """Adds what is practised to the gradients of the actor.

    Args:
        rows: answers by kind, ptx and rehearsal.
        model: whose actor practises.
        state: its scaler scales the losses, as it has scaled PPO's.
        world: the processes that share micro-batches out.
        parameters: of the actor.
        config: every setting.
        pad_id: fills up rows.

    Attributes:
        practices: what is practised; nothing before `begin`.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[PreferenceRow]],
        model: HydraModel,
        state: PPOState,
        world: World,
        parameters: Sequence[nn.Parameter],
        config: PPOConfig,
        pad_id: int,
    ) -> None:
        self.rows, self.model, self.state, self.world = rows, model, state, world
        self.parameters, self.config, self.pad_id = list(parameters), config, pad_id
        self.practices: list[Practice] = []

    def begin(self, eos_ids: Sequence[int], on_phase: Callable[[str], None], note: Callable[[str], None]) -> None:
        """Select what is rehearsed, where that is not known yet, and practise from now on.

        Args:
            eos_ids: tokens that end an answer.
            on_phase: told score as a pass over the answers begins.
            note: takes a line on what was selected.
        """
        rehearsal = self.rows["rehearsal"]
        if rehearsal and self.state.rehearsed is None:
            on_phase("score")
            found = select_rehearsed(self.model, rehearsal, self.config, eos_ids, self.pad_id)
            self.state.rehearsed = self.world.from_main(lambda: found, "selecting what is rehearsed")
            note(f"rehearsal: {len(self.state.rehearsed)} of {len(rehearsal)} answers, the best of each kind")
        self.practices = practices(self.config, self.rows["ptx"], rehearsal, self.state.rehearsed)

    @property
    def names(self) -> list[str]:
        """What metrics call the cross-entropy of each, in nats per token."""
        return [f"practice/{practice.name}_nll" for practice in self.practices]

    def add(self, place: tuple[int, int], size: tuple[int, int | None], where: str) -> Tensor:
        """Add each practice's gradients to those that the actor's parameters have; return (n,) cross-entropies.

        Args:
            place: step, and optimizer step in it.
            size: most rows, and most tokens, of a micro-batch.
            where: for the log.
        """
        return torch.cat([self._add(practice, place, size, where) for practice in self.practices])

    def _add(self, practice: Practice, place: tuple[int, int], size: tuple[int, int | None], where: str) -> Tensor:
        model, world, parameters = self.model, self.world, self.parameters
        with allocating("experience"):
            batch = practice.draw(self.config.run.seed, *place, self.pad_id, model.device)
        total = torch.zeros(1, device=model.device)
        count = batch.response_mask.sum()
        before = [parameter.grad for parameter in parameters]
        forget_gradients(parameters)

        def backward() -> None:
            pieces = batch.split(world.rows_at_once(len(batch), size[0]), size[1])
            for rows, counts in world.share(pieces, lambda rows: sum(batch.lengths[row] for row in rows)):
                check_stop()
                sequences = batch.select(rows).sequences()
                with model.role("actor"):
                    found = model.logprobs(sequences).logprobs
                    nll = -masked_mean(found, sequences.response_mask, count)
                    self.state.scaler.scale(nll if counts else nll * 0.0).backward()
                if counts:
                    total.add_(nll.detach())

        world.together(backward, f"{where}, {practice.name}, microbatch_size={size[0]}")
        world.sum_gradients(dict.fromkeys(parameters), [total])
        factor: Tensor | float = practice.coef
        if practice.is_relative:
            theirs = _norm([gradient for gradient in before if gradient is not None], total)
            ours = _norm([parameter.grad for parameter in parameters if parameter.grad is not None], total)
            factor = practice.coef * theirs / ours.clamp(min=1e-30)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, before, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                elif gradient is not None:
                    parameter.grad.mul_(factor).add_(gradient)
                else:
                    parameter.grad.mul_(factor)
        return total


def forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters have no gradient."""
    for parameter in parameters:
        parameter.grad = None


def _norm(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the length (1,) of gradients together; 0 where there are none."""
    return torch.nn.utils.get_total_norm(gradients).reshape(1) if gradients else torch.zeros_like(like)


def check_practice(
    config: PPOConfig, ptx: Sequence[PreferenceRow], rehearsal: Sequence[PreferenceRow], scores: bool
) -> dict[str, list[PreferenceRow]]:
    """Return the rows by kind.

    Args:
        scores: whether the reward head says anything.

    Raises:
        ConfigError: where settings and rows do not go together, or nothing could be selected.
    """
    rows = {"ptx": list(ptx), "rehearsal": list(rehearsal)}
    for name, settings in (("ptx", config.ptx), ("rehearsal", config.rehearsal)):
        if (settings.data is None) != (not rows[name]):
            raise ConfigError(f"{name}.data={settings.data!r} and the {name} rows do not go together; give both, or none.")
    if rows["rehearsal"] and not scores:
        raise ConfigError(UNSCORED)
    return rows


def practices(
    config: PPOConfig, ptx: Sequence[PreferenceRow], rehearsal: Sequence[PreferenceRow], kept: Sequence[int] | None
) -> list[Practice]:
    """Return what a run practises.

    Args:
        ptx, rehearsal: rows of both kinds; none of a kind that is off.
        kept: numbers of the rehearsed rows.
    """
    found = []
    if ptx:
        size = config.ptx.minibatch_size or config.minibatch_size
        found.append(_practice("ptx", ptx, config.ptx.coef, True, size))
    if rehearsal and kept:
        size = config.rehearsal.minibatch_size or config.minibatch_size
        found.append(_practice("rehearsal", [rehearsal[i] for i in kept], config.rehearsal.coef, False, size))
    return found


def _practice(name: str, rows: Sequence[PreferenceRow], coef: float, is_relative: bool, size: int) -> Practice:
    return Practice(name, [row.prompt_ids for row in rows], [row.chosen_ids for row in rows], coef, is_relative, size)


def select_rehearsed(
    model: HydraModel, rows: Sequence[PreferenceRow], config: PPOConfig, eos_ids: Sequence[int], pad_id: int
) -> list[int]:
    """Return the numbers of the rows to rehearse: of each kind, by k-means over mean states, the best by the reward head.

    The paper embeds answers with a sentence encoder and selects again each epoch; here the states are those of the same
    LoRA-off pass that scores them, and neither changes during a run. One pass over all rows.

    Memory: (rows, H) fp32 on the CPU.
    """
    prompts, answers = [row.prompt_ids for row in rows], [row.chosen_ids for row in rows]
    size = config.rollout.score_batch_size
    scores, means = scores_and_means(model, prompts, answers, eos_ids, pad_id=pad_id, rows=size)
    generator = torch.Generator().manual_seed(config.run.seed)
    groups = kmeans(means, config.rehearsal.clusters, generator)
    return best_of_each(groups, scores, config.rehearsal.share)
