"""Which decoder is right for a model: each is tried on a few tokens and held against a whole pass."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.compute.kv_int8 import check_layers
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import HydraError, NonFiniteError, UnsupportedModelError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.probe import LENGTHS, few_of, probe_rows, without_values
from hydra_ppo.rollout.decoder import Decoder, decoding_attention
from hydra_ppo.rollout.lean_decoding import supports
from hydra_ppo.rollout.plain_decoders import ModelCacheDecoder, RecomputingDecoder
from hydra_ppo.rollout.weight_copies import WeightCopies

logger = logging.getLogger("hydra_ppo")

STEPS = 6
KEY, INT8, COPIES = "decoder", "int8 cache", "weight copies"

DECODERS: tuple[tuple[type[Decoder], str], ...] = (
    (Decoder, ""),
    (ModelCacheDecoder, "rows of one prompt length at a time, on transformers' own cache: slower"),
    (RecomputingDecoder, "without a cache, prompt and answer anew for every token: much slower"),
)
"""The fastest first, each with what sampling is like with it."""

HANDLED = frozenset({"full_attention", "sliding_attention"})

NOT_WINDOWS = frozenset({"sliding_window", "max_window_layers", "use_sliding_window", "sliding_window_pattern"})
"""Settings that the masks of `decoder` heed, or that bound nothing."""


def decoder_of(model: HydraModel) -> type[Decoder]:
    """Return the fastest decoder whose log-probs are those of a whole pass, in the role in force; found once per model.

    Memory: that of sampling a few tokens.

    Raises:
        UnsupportedModelError: where none of them is right.
    """
    if KEY not in model.kept:
        model.kept[KEY] = (
            Decoder if model.check == "off" or without_values(model.architecture.output_embeddings.weight) else _try_all(model)
        )
    found: type[Decoder] = model.kept[KEY]
    return found


def check_cache(model: HydraModel, decoder: type[Decoder], kv_cache: str) -> None:
    """Refuse a cache that cannot be had; of one in int8 say, once per model, how far from a whole pass its log-probs are.

    Memory: that of sampling a few tokens.

    Raises:
        UnsupportedModelError: for int8, where the decoder has no such cache, or sampling with it fails.
    """
    if kv_cache == "auto":
        return
    check_layers()
    name = type(model.causal_lm).__name__
    if not decoder.takes_int8:
        raise UnsupportedModelError(
            f"rollout.kv_cache={kv_cache!r} is a cache that {name} cannot be sampled from with, which goes "
            f"{dict(DECODERS).get(decoder, 'another way')}; use rollout.kv_cache=auto."
        )
    if INT8 in model.kept or model.check == "off" or without_values(model.architecture.output_embeddings.weight):
        return
    try:
        away = _away(model, decoder, kv_cache=kv_cache)
    except (torch.OutOfMemoryError, HydraError):
        raise
    except Exception as error:  # of a model's own code that reads the cache past its `update`
        raise UnsupportedModelError(
            f"rollout.kv_cache={kv_cache!r} does not go with {name} ({_said(error)}); use rollout.kv_cache=auto."
        ) from error
    _say_drift(model, INT8, "keys and values in int8", away)


def check_weights(model: HydraModel, decoder: type[Decoder], weights: str) -> None:
    """Refuse copies that cannot be decoded with; say, once per model, how far from a whole pass log-probs are with them.

    Memory: that of sampling a few tokens, and the copies.

    Raises:
        UnsupportedModelError: for merged-bf16, where the model's layers are not decoded by products of ours.
    """
    if weights == "shared":
        return
    name = type(model.causal_lm).__name__
    if not (decoder.takes_copies and supports(model)):
        raise UnsupportedModelError(
            f"rollout.weights={weights!r} copies layers that are decoded one product at a time, and those of {name} are not; "
            "use rollout.weights=shared."
        )
    if COPIES in model.kept or model.check == "off" or without_values(model.architecture.output_embeddings.weight):
        return
    _say_drift(model, COPIES, "copies of the weights in bf16", _away(model, decoder, copies=WeightCopies(3)))


def _say_drift(model: HydraModel, key: str, what: str, away: Tensor) -> None:
    model.kept[key] = away.mean().item()
    logger.warning(
        "sampling from %s with %s: log-probs of %d tokens are %.2g nats from those of a whole pass on average, %.2g at most",
        *(type(model.causal_lm).__name__, what, len(away), model.kept[key], away.max().item()),
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def _try_all(model: HydraModel) -> type[Decoder]:
    reasons = []
    for decoder, what in DECODERS:
        if decoder is Decoder and (reason := _beyond_the_trial(model)) is not None:
            reasons.append(reason)
            continue
        try:
            away, tolerance = _difference(model, decoder)
        except (torch.OutOfMemoryError, NonFiniteError):
            raise
        except HydraError as error:
            reasons.append(str(error))
            continue
        except Exception as error:  # whatever a model's own code raises over a cache or a mask
            reasons.append(_said(error))
            continue
        if away <= tolerance:
            if what:
                logger.warning("sampling from %s goes %s (%s)", type(model.causal_lm).__name__, what, reasons[0])
            return decoder
        reasons.append(f"log-probs of sampled tokens differ from those of a whole pass by {away:.2g} nats")
    raise UnsupportedModelError(
        f"model={type(model.causal_lm).__name__} cannot be sampled from: {reasons[-1]}; use another model or "
        "model.attention, or set model.check=off if you know better."
    )


def _beyond_the_trial(model: HydraModel) -> str | None:
    """Return why a cache of ours could be wrong for rows that are longer than those that are tried."""
    architecture = model.architecture
    if foreign := sorted(set(architecture.layer_types) - HANDLED):
        return f"it has layers of {', '.join(foreign)}"
    settings = architecture.config.to_dict()
    windows = [
        key
        for key, value in settings.items()
        if ("window" in key or "chunk" in key) and key.lstrip("_") not in NOT_WINDOWS and isinstance(value, int) and value
    ]
    return f"its config has {windows[0]}, which may bound what a token sees" if windows else None


def _difference(model: HydraModel, decoder: type[Decoder]) -> tuple[float, float]:
    """Return the difference in nats that all but a few tokens keep to, and what would be rounding."""
    away = _away(model, decoder)
    if not away.isfinite().all():
        return float("inf"), 0.0
    dtype = model.architecture.output_embeddings.weight.dtype
    return away.quantile(1 - few_of(dtype)).item(), 2e-3 if dtype is torch.float32 else 0.15


@torch.no_grad()
def _away(model: HydraModel, decoder: type[Decoder], **options: Any) -> Tensor:
    """Return |sampled - whole pass| of the log-probs of a few tokens, in nats; the decoder gets the options."""
    device = model.device
    vocabulary = model.architecture.output_embeddings.weight.shape[0]
    long, short = probe_rows(LENGTHS["full" if model.check == "full" else "fast"], vocabulary, device)
    prompts = [long[0].tolist(), short[0].tolist(), short[0].tolist()]
    given = [STEPS, STEPS - 2, STEPS - 1]  # rows leave the batch at different times
    settings = RolloutSettings(max_new_tokens=STEPS, temperature=1.0)
    uniform = torch.rand(
        STEPS, len(given), dtype=torch.float64, generator=torch.Generator(device).manual_seed(0), device=device
    )
    with decoding_attention(model):  # and not around the whole pass, whose attention is the model's own
        tokens, logprobs, _ = decoder(model, prompts, STEPS, **options).run(settings, [], uniform, given)
    responses = [row[:length] for row, length in zip(tokens.tolist(), given, strict=True)]
    sequences = Experience.from_lists(prompts, responses, pad_id=0, device=device).sequences()
    expected = model.logprobs(sequences).logprobs
    return torch.cat([(logprobs[i, :n] - expected[i, :n]).abs() for i, n in enumerate(given)])
