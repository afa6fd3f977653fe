"""Samples responses from the actor, batch by batch: `decoder` runs one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import split_by_length
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.choice import check_cache, decoder_of
from hydra_ppo.rollout.decoder import Decoder, decoding_attention


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
) -> Samples:
    """Sample one response per prompt from a role with the lm head.

    Args:
        prompts: token ids, at least one each. Those that are equal cost one pass over the prompt.
        settings: temperature, top_k, top_p, max_new_tokens, generation_batch_size, kv_cache.
        eos_ids: tokens that end a response.
        generator: source of randomness, on the model's device.
        role: `actor`, or `reference` for the policy that training started from.
        lengths: tokens of each response, at least 1, where they are given and end tokens do not end anything.
        decoder: what decodes a batch; what `choice.decoder_of` finds right for the model where None.
        never: ids that are not sampled, such as rows of a padded vocabulary that stand for no token. Log-probs stay those of
            the whole distribution.
        stopped: says of responses so far, token ids, which are complete for another reason than an end token.

    Raises:
        NonFiniteError: when logits were NaN or infinite.
        UnsupportedModelError: when the model cannot be sampled from, or not with such a cache.
        ConfigError: for settings that another engine samples with.

    Memory: the KV cache of one generation batch, up to max_new_tokens more columns than its longest prompt, and one (B, V)
    tensor; a few with top_k or top_p.
    """
    if settings.engine != "native":
        raise ConfigError(
            f"rollout.engine={settings.engine!r} is not sampled here; hand PPOTrainer a VLLMSampler as its "
            "sampler, or use native."
        )
    was_training = model.training
    model.eval()
    # A decoder of somebody's own need not know what is not asked of it.
    cache: dict[str, Any] = {} if settings.kv_cache == "auto" else {"kv_cache": settings.kv_cache}
    responses: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    try:
        with model.role(role):
            check_cache(model, decoder := decoder or decoder_of(model), settings.kv_cache)
        with model.role(role), decoding_attention(model):
            for rows in split_by_length([len(p) for p in prompts], settings.generation_batch_size or len(prompts)):
                given = None if lengths is None else [lengths[i] for i in rows]
                steps = settings.max_new_tokens if given is None else max(given)
                batch = decoder(model, [prompts[i] for i in rows], steps, **cache)
                batch.never, batch.stopped = list(never), stopped
                tokens, token_logprobs, found = batch.run(settings, eos_ids, generator, given)
                for row, ids, values, length in zip(rows, tokens.tolist(), token_logprobs.tolist(), found, strict=True):
                    responses[row] = ids[:length]
                    logprobs[row] = values[:length]
    finally:
        model.train(was_training)
    return Samples(responses, logprobs)
