"""A reward server: asked over HTTP as OpenRLHF asks its remote reward model."""

from __future__ import annotations

import json
from collections.abc import Collection
from http.client import HTTPException
from time import sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from hydra_ppo.config.rewards import RewardSource
from hydra_ppo.errors import ConfigError, RewardError
from hydra_ppo.rewards.responses import Responses, columns_in_words

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed; any other refusal is for good."""

NEAR = ("localhost", "127.0.0.1", "::1")
"""Hosts that no proxy is asked for."""


class Server:
    """A server as a reward source.

    The request is a POST of JSON with one entry per response in each list: `query` (prompt and response as the tokens spell
    them, special ones shown), `prompts` and `labels` (the column that the source's `label` names, else empty strings). The
    answer is a JSON object whose `rewards` is a list of as many numbers; what else it holds is not read.

    (OpenRLHF: `SingleTurnAgentExecutor._fetch_rewards_via_http` in openrlhf/utils/agent.py, `openrlhf.cli.serve_rm`.)
    """

    remedy = "mend the server"

    def __init__(self, source: RewardSource) -> None:
        assert source.target is not None
        self.url, self.label = source.target, source.label
        self.batch_size, self.timeout, self.retries = source.batch_size, source.timeout, source.retries
        try:
            host = urlsplit(self.url).hostname
            port = urlsplit(self.url).port
        except ValueError as error:
            raise ConfigError(f"reward target={self.url!r} is not an address ({error}); write http://host:port/path.") from None
        if not host or port == 0 or any(letter.isspace() for letter in self.url):
            raise ConfigError(f"reward target={self.url!r} names no host and port; write http://host:port/path.")
        self._opener: OpenerDirector = build_opener(*([ProxyHandler({})] if host in NEAR else []))

    def check(self, columns: Collection[str]) -> None:
        """Refuse a `label` that is no column of the rows."""
        if self.label is not None and self.label not in columns:
            raise ConfigError(
                f"label={self.label!r} of reward target={self.url!r} is no column: the data {columns_in_words(columns)}; "
                "name one."
            )

    def __call__(self, responses: Responses) -> list[Any]:
        """Return what the server says, in the order of the responses.

        Raises:
            RewardError: when it cannot be reached, stays silent, refuses, or answers in another form.
        """
        labels = [""] * len(responses) if self.label is None else responses.column(self.label)
        step = self.batch_size or max(len(responses), 1)
        rewards: list[Any] = []
        for start in range(0, len(responses), step):
            part = slice(start, start + step)
            asked = {"query": responses.queries[part], "prompts": responses.prompts[part], "labels": labels[part]}
            body = json.dumps({name: list(values) for name, values in asked.items()}, default=str).encode()
            rewards += self._rewards(self._post(body), len(asked["query"]))
        return rewards

    def _rewards(self, answer: bytes, count: int) -> list[Any]:
        try:
            content = json.loads(answer)
        except ValueError:
            raise RewardError(f"server {self.url} answered {_shown(answer)}, which is no JSON; {self.remedy}.") from None
        rewards = content.get("rewards") if isinstance(content, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(
                f'server {self.url} answered {_shown(answer)}; it must answer {{"rewards": [one number per response]}}.'
            )
        if len(rewards) != count:
            raise RewardError(f"server {self.url} returned {len(rewards)} rewards for {count} responses; {self.remedy}.")
        return rewards

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            if attempt:
                sleep(2.0 ** (attempt - 1))
            request = Request(self.url, body, {"Content-Type": "application/json", "Accept": "application/json"})
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return bytes(answer.read())
            except HTTPError as error:
                said = _shown(error.read())
                failure = f"answered {error.code} {error.reason}: {said}" if said else f"answered {error.code} {error.reason}"
                if error.code not in AGAIN:
                    raise RewardError(f"server {self.url} {failure}; {self.remedy}, or its address.") from None
            except TimeoutError:
                failure = f"was silent for timeout={self.timeout:g} s"
            except (URLError, HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                silent = isinstance(reason, TimeoutError)
                failure = f"was silent for timeout={self.timeout:g} s" if silent else f"cannot be asked ({_reason(reason)})"
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise RewardError(f"server {self.url} {failure}, asked {times}; start it again, or raise timeout or retries.")


def _reason(error: Any) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def _shown(answer: bytes) -> str:
    text = " ".join(answer[:400].decode(errors="replace").split())
    return text if len(text) <= 120 else f"{text[:120]}..."
