"""Looks at a server before anything is sampled: what it serves, and what about the way it was started is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.rollout.vllm.asking import KEY, Failed, Refused, Server, Waiting
from hydra_ppo.rollout.vllm.launch import Launch, served_rank

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATIENCE = 60.0
"""Seconds that a server may take to say what it is; the first time it looks at the machine that it runs on."""


@dataclass(frozen=True)
class Needs:
    """What a run asks of a server.

    Attributes:
        tokens: of its longest prompt and response together.
        rank: of its adapter.
        model: what the base is called; None is the first that the server has.
        launch: how a server is started that gives all of this.
    """

    tokens: int
    rank: int
    model: str | None
    launch: Launch

    def start(self, url: str) -> str:
        """Say how the server at an address is started."""
        return f"start it with: {self.launch.at(url).line()}"


@dataclass(frozen=True)
class Seen:
    """What a server is.

    Attributes:
        url: its address.
        version: of vLLM.
        base: what it calls the base.
        root: where the base comes from, as the server was told.
        adapters: that are loaded, by name: the folders.
        dtype: that it computes in, such as float32; None where it does not say.
        quantization: of its base; None also where it does not say.
        told: whether it says how it was started.
    """

    url: str
    version: str
    base: str
    root: str
    adapters: dict[str, str]
    dtype: str | None
    quantization: str | None
    told: bool

    def __str__(self) -> str:
        held = f", {self.quantization}" if self.quantization else ""
        as_ = f" in {self.dtype}{held}" if self.dtype else ""
        return f"vLLM {self.version} at {self.url} serves {self.root!r}{as_} as {self.base!r}"


def look(server: Server, needs: Needs) -> Seen:
    """Look at a server.

    Raises:
        ConfigError: naming the first thing that is wrong, and the command that starts a server right.
    """
    start = needs.start(server.url)
    where = f"rollout.vllm.urls: {server.url}"
    waiting = Waiting()
    quick = Server(server.url, min(server.timeout, PATIENCE), 0)
    cards = _cards(quick, waiting, where, start)
    version = _version(quick, waiting, where, start)
    bases = [card for card in cards if card.get("parent") is None]
    base = next((card for card in bases if needs.model in (None, card.get("id"))), None)
    if base is None:
        names = ", ".join(str(card.get("id")) for card in bases) or "nothing"
        raise ConfigError(
            f"rollout.vllm.model={needs.model!r} is not what {server.url} serves, which is {names}; name one of those, or "
            "leave it null."
        )
    longest = base.get("max_model_len")
    if isinstance(longest, int) and longest < needs.tokens:
        raise ConfigError(
            f"{where} takes {longest} tokens (--max-model-len), prompt and response may have {needs.tokens} "
            f"(data.max_prompt_tokens + rollout.max_new_tokens); {start}"
        )
    told = _told(quick, waiting)
    if told is not None:
        _check_started(told, needs, where, start)
    try:
        quick.once(waiting, LOAD, {}, again=frozenset())
    except Refused as error:
        if error.status == 404:
            raise ConfigError(
                f"{where} takes no adapters while it runs (VLLM_ALLOW_RUNTIME_LORA_UPDATING is not 1); {start}"
            ) from None
    except Failed as error:
        raise ConfigError(f"{where} {error}; {start}") from None
    adapters = {str(card.get("id")): str(card.get("root")) for card in cards if card.get("parent") is not None}
    config = (told or {}).get("model_config") or {}
    dtype, held = config.get("dtype"), config.get("quantization")
    return Seen(
        server.url,
        version,
        str(base["id"]),
        str(base.get("root")),
        adapters,
        None if dtype is None else str(dtype).removeprefix("torch."),
        None if held is None else str(held),
        told is not None,
    )


def _cards(server: Server, waiting: Waiting, where: str, start: str) -> list[Mapping[str, Any]]:
    """Return what /v1/models lists."""
    try:
        models = server.once(waiting, "/v1/models")
    except Failed as error:
        raise ConfigError(f"{where} {error}; {start}") from None
    except Refused as error:
        if error.status in (401, 403):
            raise ConfigError(f"{where} wants a key (it answered {error}); put it into the variable {KEY}.") from None
        models = None
    cards = models.get("data") if isinstance(models, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise ConfigError(f"{where} is no vLLM server: /v1/models lists no models there; {start}")
    owner = next((card.get("owned_by") for card in cards if card.get("owned_by") != "vllm"), None)
    if owner is not None or not cards:
        raise ConfigError(f"{where} is no vLLM server: what it serves is owned by {owner!r}; {start}")
    return cards


def _version(server: Server, waiting: Waiting, where: str, start: str) -> str:
    try:
        found = server.once(waiting, "/version")
    except (Failed, Refused):
        found = None
    version = found.get("version") if isinstance(found, dict) else None
    if not isinstance(version, str):
        raise ConfigError(f"{where} is no vLLM server: /version does not say which; {start}")
    return version


def _told(server: Server, waiting: Waiting) -> Mapping[str, Any] | None:
    """Return how a server was started; None where it does not say (VLLM_SERVER_DEV_MODE)."""
    try:
        found = server.once(waiting, "/server_info?config_format=json")
    except (Failed, Refused):
        return None
    config = found.get("vllm_config") if isinstance(found, dict) else None
    return config if isinstance(config, dict) else None


def _check_started(told: Mapping[str, Any], needs: Needs, where: str, start: str) -> None:
    """Refuse what would give wrong numbers, or fail later.

    Raises:
        ConfigError: naming the first.
    """
    model, parallel, lora = (told.get(name) or {} for name in ("model_config", "parallel_config", "lora_config"))
    if not told.get("lora_config"):
        raise ConfigError(f"{where} serves no adapters (--enable-lora is not on); {start}")
    if (mode := model.get("logprobs_mode")) not in (None, "processed_logprobs"):
        raise ConfigError(
            f"{where} gives {mode} (--logprobs-mode), which are not those of what it draws from: the temperature is left out; "
            f"{start}"
        )
    if (rank := lora.get("max_lora_rank")) is not None and rank < needs.rank:
        raise ConfigError(
            f"{where} takes adapters up to rank {rank}, the actor's has {needs.rank} (--max-lora-rank "
            f"{served_rank(needs.rank)}); {start}"
        )
    if (count := lora.get("max_loras")) is not None and count < 2:
        raise ConfigError(
            f"{where} keeps {count} adapter (--max-loras), and a new version is loaded before the old one goes; {start}"
        )
    if (only := lora.get("target_modules")) is not None:
        raise ConfigError(f"{where} lets adapters sit on {only} alone (--lora-target-modules), and drops the rest; {start}")
    for name, option in (("data_parallel_size", "--data-parallel-size"), ("_api_process_count", "--api-server-count")):
        if (count := parallel.get(name)) is not None and count > 1:
            raise ConfigError(
                f"{where} runs {count} replicas ({option}), of which one alone gets an adapter; start a server for each and "
                f"name all of them in rollout.vllm.urls; {start}"
            )
    if (generation := model.get("generation_config")) not in (None, "vllm"):
        raise ConfigError(
            f"{where} takes defaults from a generation_config.json (--generation-config {generation}), which may cut what is "
            f"drawn from, or how long a response gets; {start}"
        )
