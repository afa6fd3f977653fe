"""Settings of sampling and scoring, and of what is done about log-probs that two ways of computing them tell differently."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal

from hydra_ppo.config.fields import check as _check
from hydra_ppo.config.fields import not_negative as _not_negative
from hydra_ppo.config.fields import positive as _positive
from hydra_ppo.config.fields import setting
from hydra_ppo.config.vllm import VLLMSettings
from hydra_ppo.errors import ConfigError

BENDING = ("top_k", "top_p", "min_new_tokens", "repetition_penalty")
"""Settings that have tokens drawn from another distribution than the policy's, of which a vLLM server then gives log-probs."""


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are sampled and scored."""

    batch_size: int = setting(64, "Responses per PPO step.")
    samples_per_prompt: int = setting(1, "Responses sampled for each prompt; batch_size counts responses.")
    generation_batch_size: int | None = setting(None, "Responses decoded together; null decodes the whole batch at once.")
    max_new_tokens: int = setting(128, "Longest response, in tokens.")
    temperature: float = setting(1.0, "Sampling temperature; log-probs are those of the temperature-scaled policy.")
    top_k: int | None = setting(None, "Sample among this many most likely tokens; null is all.")
    top_p: float | None = setting(None, "Sample among the smallest set of tokens with this probability; null is all.")
    min_new_tokens: int = setting(0, "Draw no end before this many tokens; log-probs stay those of the policy itself.")
    repetition_penalty: float = setting(
        1.0, "Draw tokens that were there before less likely, as transformers does; log-probs stay those of the policy itself."
    )
    stop: list[str] = setting(list, "Strings that end a response where they are complete, beside the end of a turn.")
    score_batch_size: int = setting(16, "Most responses per scoring pass (reference, reward, critic), which keeps no graph.")
    trunk_cache: Literal["device", "cpu"] = setting(
        "device", "Where the hidden states that leave the trunk are kept, one per token, with model.trunk_layers above 0."
    )
    recompute_logprobs: bool = setting(
        False, "Recompute the sampled tokens' log-probs in a pass of its own instead of keeping the sampler's."
    )
    kv_cache: Literal["auto", "int8"] = setting(
        "auto",
        "Keys and values while sampling: auto in the compute type; int8 in half of that, a scale for each token and head, with "
        "log-probs that are off by rounding (rollout/drift).",
    )
    weights: Literal["shared", "merged-bf16"] = setting(
        "shared",
        "What decoding multiplies with: the base and the adapter themselves; or merged-bf16, copies of both in one, 2 bytes a "
        "weight, made anew for each rollout: about twice as fast on a CPU, with log-probs that are off by rounding.",
    )
    measure_drift: bool = setting(
        False,
        "Compare the sampler's log-probs with those of a pass over a quarter of each rollout, 16 rows at most; int8 and "
        "merged-bf16 always do.",
    )
    max_drift: float | None = setting(
        0.1,
        "Where the drift is measured and its mean is above this (nats per token), that rollout's log-probs are all recomputed; "
        "null never does. Computing in bf16 alone drifts by 0.04, in fp32 with int8 by 0.015 (SmolLM2-135M).",
    )
    importance_cap: float | None = setting(
        None,
        "Where log-probs were recomputed, weigh each token's policy loss by what the pass gives it over what the sampler gave "
        "it, at most by this; null weighs nothing.",
    )
    engine: Literal["native", "vllm"] = setting(
        "native",
        "Who samples: the training process, or vLLM servers (rollout.vllm), which get the actor's adapter; log-probs are then "
        "always recomputed.",
    )
    vllm: VLLMSettings = setting(VLLMSettings, "The servers that sample, with engine=vllm.")

    @property
    def recomputes(self) -> bool:
        """Whether the sampled tokens' log-probs come from a pass of their own."""
        return self.recompute_logprobs or self.engine == "vllm"

    @property
    def weight_cap(self) -> float | None:
        """Up to where tokens are weighed, of the engine that samples; None weighs nothing."""
        return self.vllm.importance_cap if self.engine == "vllm" else self.importance_cap

    @property
    def measures_drift(self) -> bool:
        """Whether the sampler's log-probs are held against those of a pass."""
        return self.measure_drift or self.kv_cache == "int8" or self.weights != "shared"

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "samples_per_prompt", "generation_batch_size", "score_batch_size", "max_new_tokens")
        _positive(self, "temperature", "top_k", "repetition_penalty", "max_drift")
        _not_negative(self, "min_new_tokens")
        _check(self, "stop", all(self.stop), "holds an empty string", "name strings that a response can hold")
        _check(
            self,
            "min_new_tokens",
            self.min_new_tokens < self.max_new_tokens,
            f"leaves no room to end within max_new_tokens={self.max_new_tokens}",
            "choose a smaller one",
        )
        _check(
            self,
            "batch_size",
            self.batch_size % self.samples_per_prompt == 0,
            f"is not divisible by samples_per_prompt={self.samples_per_prompt}",
            f"choose a samples_per_prompt that divides {self.batch_size}",
        )
        _check(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "must lie in (0, 1]", "choose for example 0.95")
        cap = self.importance_cap
        _check(self, "importance_cap", cap is None or cap >= 1, "must be at least 1, what equal log-probs give", "choose 2")
        _check(
            self,
            "importance_cap",
            cap is None or self.recomputes or (self.measures_drift and self.max_drift is not None),
            "weighs recomputed log-probs, and none are ever recomputed",
            "set recompute_logprobs=true, or kv_cache=int8, weights=merged-bf16 or measure_drift=true with a max_drift, or "
            "leave it null",
        )
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse what the engine that samples does not do, or would pass over."""
        if self.engine == "native":
            given = next((item for item in fields(self.vllm) if getattr(self.vllm, item.name) != _default(item)), None)
            if given is not None:
                raise ConfigError(
                    f"rollout.vllm.{given.name}={getattr(self.vllm, given.name)!r} is for rollout.engine='vllm', and engine is "
                    "'native'; set rollout.engine=vllm, or leave it out."
                )
            return
        if not self.vllm.urls:
            raise ConfigError(
                "rollout.vllm.urls=[] names no server, and rollout.engine='vllm' samples on one; start it as hydra-ppo serve "
                "says, and write urls: [http://127.0.0.1:8000]."
            )
        for name in BENDING:
            rule = "makes a vLLM server draw from another distribution than the policy's and give log-probs of that"
            plain = getattr(self, name) == type(self).__dataclass_fields__[name].default
            _check(self, name, plain, rule, f"leave {name} out, or use engine=native")
        _check(
            self, "kv_cache", self.kv_cache == "auto", "is a cache of this process, and vLLM has its own", "leave it at auto"
        )
        rule = "are copies in this process, and vLLM has weights of its own"
        _check(self, "weights", self.weights == "shared", rule, "leave it at shared")
        rule = "is the cap of engine=native; with vllm it is rollout.vllm.importance_cap"
        _check(self, "importance_cap", self.importance_cap is None, rule, "set that one")


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
