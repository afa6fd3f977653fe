"""Settings of sampling on vLLM servers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from hydra_ppo.config.fields import check, expand_home, not_negative, positive, setting


@dataclass(frozen=True)
class VLLMSettings:
    """The servers that sample with rollout.engine=vllm. A key is read from VLLM_API_KEY, as the server reads its own."""

    urls: list[str] = setting(list, "Addresses of the servers, http://host:port each; the rows are dealt out to them.")
    model: str | None = setting(None, "What the servers call the base; null is the first of /v1/models that is no adapter.")
    adapter_folder: str | None = setting(
        None,
        "Where each version of the actor's adapter is written, a path that the servers read too, such as one below /dev/shm; "
        "null is the folder vllm of the run.",
    )
    timeout: float = setting(600.0, "Seconds that a server may take over one response, waiting in its queue included.")
    retries: int = setting(
        6, "How often a request is sent again where no server answers or it fails, after 1, 2, 4, ... and at most 30 seconds."
    )
    importance_cap: float | None = setting(
        2.0,
        "Weigh each token's policy loss by what our own pass gives it over what the server gave it, at most by this; null "
        "weighs nothing.",
    )

    def __post_init__(self) -> None:
        expand_home(self, "adapter_folder")
        positive(self, "timeout")
        not_negative(self, "retries")
        for text in ("model", "adapter_folder"):
            check(self, text, getattr(self, text) != "", "is empty", "name one, or leave it null")
        cap = self.importance_cap
        check(self, "importance_cap", cap is None or cap >= 1, "must be at least 1, what equal log-probs give", "choose 2")
        object.__setattr__(self, "urls", [url.rstrip("/").removesuffix("/v1") for url in self.urls])
        wrong = next((url for url in self.urls if not _is_address(url)), None)
        check(self, "urls", wrong is None, f"has {wrong!r}, which is no address of a server", "write http://host:port")
        twice = next((url for url in self.urls if self.urls.count(url) > 1), None)
        check(self, "urls", twice is None, f"names {twice} twice", "name each server once")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    rest = parts.query or parts.fragment or parts.username or any(letter.isspace() for letter in url)
    return parts.scheme in ("http", "https") and named and not rest
