"""Samples responses from the actor, batch by batch: `decoder` runs one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import split_by_length
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.parallel.world import ALONE, World
from hydra_ppo.rollout.choice import check_cache, check_weights, decoder_of
from hydra_ppo.rollout.decoder import Decoder, decoding_attention
from hydra_ppo.rollout.weight_copies import WeightCopies


@dataclass(frozen=True)
class Samples:
    """Sampled responses, in the order of their prompts.

    Attributes:
        responses: token ids of each, the end-of-sequence token included where it came.
        logprobs: of each token under the temperature-scaled policy before top-k and top-p, nats.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]


@torch.no_grad()
def sample(
    model: HydraModel,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    eos_ids: Sequence[int],
    generator: torch.Generator,
    role: str = "actor",
    lengths: Sequence[int] | None = None,
    decoder: type[Decoder] | None = None,
    never: Sequence[int] = (),
    stopped: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None,
    world: World = ALONE,
) -> Samples:
    """Sample one response per prompt from a role with the lm head.

    Args:
        prompts: token ids, at least one each. Those that are equal cost one pass over the prompt.
        settings: temperature, top_k, top_p, max_new_tokens, generation_batch_size, kv_cache, weights.
        eos_ids: tokens that end a response.
        generator: source of randomness, on the model's device. What a row draws depends neither on the batch that it is
            decoded in nor on the number of processes.
        role: `actor`, or `reference` for the policy that training started from.
        lengths: tokens of each response, at least 1, where they are given and end tokens do not end anything.
        decoder: what decodes a batch; what `choice.decoder_of` finds right for the model where None.
        never: ids that are not sampled, such as rows of a padded vocabulary that stand for no token. Log-probs stay those of
            the whole distribution.
        stopped: says of responses so far, token ids, which are complete for another reason than an end token.
        world: the processes that share the batches out.

    Raises:
        NonFiniteError: when logits were NaN or infinite.
        UnsupportedModelError: when the model cannot be sampled from, or not with such a cache.
        ConfigError: for settings that another engine samples with.

    Memory: the KV cache of one generation batch, up to max_new_tokens more columns than its longest prompt, and one (B, V)
    tensor; a few with top_k or top_p. With `weights` merged-bf16 the copies, see `WeightCopies`, until all batches are decoded.
    """
    if settings.engine != "native":
        raise ConfigError(
            f"rollout.engine={settings.engine!r} is not sampled here; hand PPOTrainer a VLLMSampler as its "
            "sampler, or use native."
        )
    was_training = model.training
    model.eval()
    together = world.rows_at_once(len(prompts), settings.generation_batch_size or len(prompts))
    # A decoder of somebody's own need not know what is not asked of it.
    options: dict[str, Any] = {} if settings.kv_cache == "auto" else {"kv_cache": settings.kv_cache}
    if settings.weights != "shared":
        options["copies"] = WeightCopies(together)
    groups = split_by_length([len(p) for p in prompts], together)
    batches = list(zip(accumulate(map(len, groups), initial=0), groups, strict=False))  # each with its first column below
    most = settings.max_new_tokens if lengths is None else max(lengths)
    uniform = torch.rand(most, len(prompts), dtype=torch.float64, generator=generator, device=model.device)

    def decode() -> dict[int, tuple[list[int], list[float]]]:
        found: dict[int, tuple[list[int], list[float]]] = {}
        with model.role(role):
            kind = decoder or decoder_of(model)
            check_cache(model, kind, settings.kv_cache)
            check_weights(model, kind, settings.weights)
        with model.role(role), decoding_attention(model):
            for (start, rows), counts in world.share(batches, lambda batch: len(batch[1])):
                given = None if lengths is None else [lengths[i] for i in rows]
                steps = most if given is None or world.in_step else max(given)
                batch = kind(model, [prompts[i] for i in rows], steps, **options)
                batch.never, batch.stopped = list(never), stopped
                batch.anybody = world.anybody if world.in_step else None
                numbers = uniform[:steps, start : start + len(rows)]
                tokens, logprobs, ends = batch.run(settings, eos_ids, numbers, given)
                for row, ids, values, length in zip(rows, tokens.tolist(), logprobs.tolist(), ends, strict=True):
                    if counts:
                        found[row] = ids[:length], values[:length]
        return found

    try:
        mine = world.together(decode, f"sampling {len(prompts)} responses, {together} at once")
    finally:
        model.train(was_training)
    rows = {row: both for part in world.gather(mine) for row, both in part.items()}
    return Samples([rows[i][0] for i in range(len(prompts))], [rows[i][1] for i in range(len(prompts))])
