"""Collects experience: sample from the actor, one LoRA-off pass, one critic pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hydra_ppo.algorithms.losses import logprob_drift
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.experience import Experience, ScoredExperience, Sequences
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.rollout.sampling import Samples, sample
from hydra_ppo.runtime.announce import allocating
from hydra_ppo.runtime.exhaustion import Limits
from hydra_ppo.runtime.interruption import check_stop


@runtime_checkable
class Watching(Protocol):
    """A sampler that wants to know what was made of its log-probs."""

    def watch(self, found: ScoredExperience, model: HydraModel, where: str) -> None:
        """Take in a rollout that is scored."""


@dataclass(frozen=True)
class Passes:
    """Which roles score responses, beside reference and reward.

    Attributes:
        actor: whose log-probs are recomputed, where they are.
        critic: whether there is a critic.
        after_last: whether its values of the states after the last tokens are wanted too.
        states: whether those that scores are read from are kept, (B, H) fp32, which costs no pass.
    """

    actor: str = "actor"
    critic: bool = True
    after_last: bool = False
    states: bool = False


PPO_PASSES = Passes()
MEASURED, OF = 16, 4
"""Most rows of a rollout on which drift is measured, the longest, and of how many rows one: some hundred to some thousand
tokens, for one pass over them. Of a small rollout 16 would be all, and the pass would cost more than a faster sampler wins."""


def collect_experience(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator,
    on_phase: Callable[[str], None] = lambda phase: None,
    sampler: Callable[..., Samples] = sample,
    limits: Limits | None = None,
    where: str = "",
    never: Sequence[int] = (),
    stopped: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None,
    world: World = ALONE,
    passes: Passes = PPO_PASSES,
) -> ScoredExperience:
    """Sample a response to each prompt and score it in the three other roles.

    Args:
        prompts: token ids of each prompt.
        settings: how to sample, and how many rows to score at once.
        eos_ids: tokens that end a response. Scores are read at the first of them, which is what answers were trained to end
            in: where a response ended in another, the reward head sees the first in its place.
        pad_id: fills up the rows; never seen by a row that counts.
        generator: source of randomness, on the model's device.
        on_phase: told "rollout" and "score" as they begin.
        sampler: called as `sample` is.
        limits: what has fitted into memory so far; where it runs out, fewer rows are decoded or scored at once.
        where: step, for the log.
        never, stopped: as of `sample`.
        world: the processes that share the work out; all get the whole result. A sampler that is not `sample` is asked by
            rank 0 alone.
        passes: which roles there are passes for.

    Returns:
        The rows, with the scores (B,) of the reward head, and those of its members where there are several.

    Memory: the KV cache while sampling; afterwards five (B, R) tensors.
    """
    rows = len(prompts)
    together = settings.generation_batch_size or rows
    sizes = {"rollout.generation_batch_size": together, "rollout.score_batch_size": settings.score_batch_size}
    limits = limits or Limits(sizes, model.device)
    before = generator.get_state()

    def decode(size: int) -> Samples:
        on_phase("rollout")
        # A sampler of somebody's own need not know what is not asked of it.
        options = {name: value for name, value in (("never", never), ("stopped", stopped)) if value}
        ask = partial(sampler, model, prompts, replace(settings, generation_batch_size=size), eos_ids, generator, **options)
        if world.size > 1 and getattr(sampler, "func", sampler) is sample:
            return ask(world=world)
        samples, state = world.from_main(lambda: (ask(), generator.get_state()), f"{where} phase=rollout")
        generator.set_state(state)
        return samples

    def score_all(size: int) -> ScoredExperience:
        on_phase("score")
        return score(model, experience, logprobs, replace(settings, score_batch_size=size), eos_ids, world, passes)

    samples = limits.fit(
        "rollout.generation_batch_size",
        f"{where} phase=rollout",
        decode,
        undo=lambda: generator.set_state(before),
        most=min(together, rows),
    )
    with allocating("experience"):
        experience = Experience.from_lists(prompts, samples.responses, pad_id, model.device)
        logprobs = _pad(samples.logprobs, experience)
    found = limits.fit("rollout.score_batch_size", f"{where} phase=score", score_all, most=rows)
    if isinstance(sampler, Watching):
        sampler.watch(found, model, where)
    return found


@torch.no_grad()
def score(
    model: HydraModel,
    experience: Experience,
    logprobs: Tensor,
    settings: RolloutSettings,
    eos_ids: Sequence[int] = (),
    world: World = ALONE,
    passes: Passes = PPO_PASSES,
) -> ScoredExperience:
    """Find reference log-probs, scores and values: two passes over the base (three where log-probs are recomputed).

    Where the model has a trunk, the first pass finds what leaves it too, and the others begin there; not where several
    processes share the rows out, since what leaves the trunk is too much to send around.

    Where drift is measured, the actor's log-probs of some of the longest rows are recomputed too; those of all rows, where
    what the sampler had is further from them than the settings allow. So neither depends on how many rows are scored at once.

    Args:
        logprobs: (B, R) of the sampled tokens under the actor, as the sampler had them, nats.
        eos_ids: tokens that end a response; a row that ends in one is scored as if it ended in the first.
        world: the processes that share the rows out; all get the whole result.
        passes: which roles there are passes for; values are 0 without a critic.
    """
    model.eval()
    shape = experience.response_mask.shape
    with allocating("experience"):
        ref_logprobs, old_values, recomputed = (torch.zeros(shape, device=model.device) for _ in range(3))
        scores = torch.zeros(shape[0], device=model.device)
        ends = torch.zeros(shape[0], model.architecture.hidden_size, device=model.device) if passes.states else None
        after_last = torch.zeros_like(scores) if passes.after_last else None
        members = torch.zeros(shape[0], model.reward_heads, device=model.device) if model.reward_heads > 1 else None
        trunk = _room_for_trunk(model, experience, settings) if world.size == 1 else None
    count = min(MEASURED, -(-len(experience) // OF))
    measured = set(_longest(experience, count)) if settings.measures_drift and not settings.recomputes else set()
    groups = experience.split(world.rows_at_once(len(experience), settings.score_batch_size))
    every = settings.recomputes or (world.in_step and bool(measured))  # in step all make the same passes
    left = [] if every else [rest for rows in groups if (rest := [row for row in rows if row not in measured])]

    def run(rows: list[int], counts: bool) -> None:
        check_stop()
        with allocating("experience"):
            part = experience.select(rows)
            sequences = ending_alike(part.sequences(), eos_ids)
        index = torch.tensor(rows, device=model.device)
        width = part.response_ids.shape[1]
        with model.taking_trunk() as states:
            if ends is not None:
                found, (scored, each, read) = model.reference_and_all(sequences, settings.temperature)
                if counts:
                    ends[index] = read
                del read
            elif members is not None:
                found, scored, each = model.reference_and_members(sequences, settings.temperature)
            else:
                found, scored = model.reference_and_reward(sequences, settings.temperature)
            if counts and members is not None:
                members[index] = each
        if counts:
            ref_logprobs[index, :width], scores[index] = found, scored
        del found, scored
        if trunk is not None:  # the first pass ran it; no other has to
            sequences = replace(sequences, trunk=states[0])
            trunk[index.to(trunk.device), : states[0].shape[1]] = states[0].to(trunk.device)
        if passes.critic:
            with model.role("critic"):
                after: Tensor | None = None
                if after_last is None:
                    values = model.values(sequences)
                else:
                    values, after = model.values_and_next(sequences)
            if counts:
                old_values[index, :width] = values
            if counts and after_last is not None and after is not None:
                after_last[index] = after
        if every:
            with model.role(passes.actor):
                actors = model.logprobs(sequences, settings.temperature).logprobs
            if counts:
                recomputed[index, :width] = actors
        elif mine := [row for row in rows if row in measured]:
            run_actor(mine, counts)

    def run_actor(rows: list[int], counts: bool) -> None:
        check_stop()
        with allocating("experience"):
            part = experience.with_trunk(trunk).select(rows)
            index = torch.tensor(rows, device=model.device)
        with model.role(passes.actor):
            found = model.logprobs(ending_alike(part.sequences(), eos_ids), settings.temperature).logprobs
        if counts:
            recomputed[index, : found.shape[1]] = found

    def tokens(rows: list[int]) -> int:
        return sum(experience.lengths[row] for row in rows)

    world.together(lambda: _each(run, world.share(groups, tokens)), f"scoring {len(groups)} groups")
    # The rows of others are zeros here, so a sum gathers them, and to the last bit.
    needed = [*([old_values] if passes.critic else []), *([recomputed] if every or measured else [])]
    needed += [found for found in (after_last, members, ends) if found is not None]
    world.sum([ref_logprobs, scores, *needed])
    drift, recompute = None, settings.recomputes
    if measured:
        drift = _drift(experience, logprobs, recomputed, sorted(measured))
        recompute = settings.max_drift is not None and drift[0] > settings.max_drift
        if recompute and left:
            if not world.is_main:
                recomputed.zero_()  # what all have by now counts once
            world.together(lambda: _each(run_actor, world.share(left, tokens)), f"recomputing {len(left)} groups")
            world.sum([recomputed])
    with allocating("experience"):
        outside = ~experience.response_mask
        return ScoredExperience(
            **(experience.parts(Experience) | {"trunk": trunk}),
            old_logprobs=recomputed.masked_fill(outside, 0.0) if recompute else logprobs,
            sampler_logprobs=logprobs if recompute else None,
            ref_logprobs=ref_logprobs.masked_fill(outside, 0.0),
            old_values=old_values.masked_fill(outside, 0.0),
            scores=scores,
            after_last=after_last,
            members=members,
            drift=drift,
            features=ends,
        )


def _each(run: Callable[[list[int], bool], None], groups: Sequence[tuple[list[int], bool]]) -> None:
    for rows, counts in groups:
        run(rows, counts)


def _longest(experience: Experience, count: int) -> list[int]:
    """Return the numbers of that many of the longest rows, or of all."""
    return [row for (row,) in experience.split(1)[:count]]


def _drift(experience: Experience, logprobs: Tensor, recomputed: Tensor, rows: Sequence[int]) -> tuple[float, float]:
    """Return mean and largest |difference| of the log-probs of some rows, nats per token."""
    index = torch.tensor(rows, device=logprobs.device)
    mean, largest = logprob_drift(logprobs[index], recomputed[index], experience.response_mask[index]).tolist()
    return mean, largest


def ending_alike(sequences: Sequences, eos_ids: Sequence[int]) -> Sequences:
    """Let rows that end in any of `eos_ids` end in the first of them.

    The last token of a row changes the hidden state at its own place alone, which only the reward head reads: log-probs are
    taken from the states before it, and so are values. So one pass serves reference and reward as before, and a policy
    cannot gain by ending its answers in a token that the reward head was not trained at.
    """
    if len(eos_ids) < 2:
        return sequences
    last = sequences.last_positions()[:, None]  # (B, 1)
    found = sequences.input_ids.gather(1, last)
    ended = torch.isin(found, torch.tensor(list(eos_ids), device=found.device))
    ended &= sequences.response_mask.any(dim=1, keepdim=True)
    return replace(sequences, input_ids=sequences.input_ids.scatter(1, last, found.masked_fill(ended, eos_ids[0])))


def _room_for_trunk(model: HydraModel, experience: Experience, settings: RolloutSettings) -> Tensor | None:
    """Return room for what leaves the trunk, (B, T, H) in the compute type; None where the model has none."""
    if model.trunk is None:
        return None
    width = model.causal_lm.config.hidden_size  # of the layers; OPT projects its last hidden states to another
    device = "cpu" if settings.trunk_cache == "cpu" else model.device
    return torch.zeros(len(experience), max(experience.lengths), width, dtype=model.causal_lm.dtype, device=device)


def _pad(rows: Sequence[Sequence[float]], experience: Experience) -> Tensor:
    width = experience.response_ids.shape[1]
    return torch.tensor([list(row) + [0.0] * (width - len(row)) for row in rows], device=experience.response_ids.device)
