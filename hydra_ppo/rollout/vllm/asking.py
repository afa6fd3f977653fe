"""Asks servers over HTTP, many requests at once, and hears a wish to stop while it waits."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hydra_ppo.errors import ServerError
from hydra_ppo.runtime.interruption import check_stop

T = TypeVar("T")

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed; any other refusal is for good."""
CONNECTING = 10.0
"""Seconds that a connection may take to come about."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries, at most."""
LISTEN = 0.1
"""Seconds between two looks at whether to stop."""
KEY = "VLLM_API_KEY"
"""Environment variable of the key, for this side as for the server."""


class Refused(Exception):
    """A server answered that it will not.

    Attributes:
        status: of the answer.
        text: what it said.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class Failed(Exception):
    """A request found no answer, or one after which it may be sent again; says what happened."""


class GivenUp(Exception):
    """Raised inside a thread whose work is wanted no more."""


class Waiting:
    """The open connections of some requests, which can be given up together: a server drops a request whose asker hangs up."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._open: set[HTTPConnection] = set()

    def add(self, connection: HTTPConnection) -> None:
        """Take in a connection.

        Raises:
            GivenUp: where it comes too late.
        """
        with self._lock:
            if self.over.is_set():
                raise GivenUp
            self._open.add(connection)

    def done(self, connection: HTTPConnection) -> None:
        """Forget and close a connection."""
        with self._lock:
            self._open.discard(connection)
            connection.close()

    def give_up(self) -> None:
        """Hang up all of them, and let no other begin."""
        with self._lock:
            self.over.set()
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(SHUT_RDWR)  # whoever reads from it wakes up

    def pause(self, seconds: float) -> None:
        """Wait that long.

        Raises:
            GivenUp: where nothing more is wanted.
        """
        if self.over.wait(seconds):
            raise GivenUp


@dataclass(frozen=True)
class Server:
    """One server.

    Attributes:
        url: http://host:port, and perhaps a path.
        timeout: seconds that it may be silent.
        retries: how often a request that failed is sent again.
    """

    url: str
    timeout: float
    retries: int

    def ask(self, waiting: Waiting, path: str, body: Any = None, *, again: frozenset[int] = AGAIN) -> Any:
        """Return what the server answers, JSON read; without a `body` it is a GET.

        Args:
            again: statuses after which the request is sent once more.

        Raises:
            Refused: where it answers with another status than 200.
            ServerError: where it gives no answer, however often it is asked.
        """
        for attempt in range(self.retries + 1):
            if attempt:
                waiting.pause(min(2.0 ** (attempt - 1), LONGEST_PAUSE))
            try:
                return self.once(waiting, path, body, again=again)
            except Failed as error:
                failure = str(error)
        times = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise ServerError(
            f"vLLM server {self.url} {failure}, asked {times}; start it again (hydra-ppo serve says how) and go on with "
            "--resume, or raise rollout.vllm.timeout or rollout.vllm.retries."
        )

    def once(self, waiting: Waiting, path: str, body: Any = None, *, again: frozenset[int] = AGAIN) -> Any:
        """Ask once.

        Raises:
            Refused, Failed: see there.
        """
        parts = urlsplit(self.url)
        assert parts.hostname is not None  # the settings were checked
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=min(CONNECTING, self.timeout))  # a new one: none is stale
        waiting.add(connection)
        try:
            connection.connect()
            if waiting.over.is_set():  # what was hung up before had no socket yet
                raise GivenUp
            connection.sock.settimeout(self.timeout)
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            if key := os.environ.get(KEY):
                headers["Authorization"] = f"Bearer {key}"
            content = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", parts.path + path, content, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: what is no HTTP
            if waiting.over.is_set():
                raise GivenUp from None
            silent = isinstance(error, TimeoutError)
            raise Failed(f"was silent for {self.timeout:g} s" if silent else f"cannot be asked ({_reason(error)})") from None
        finally:
            waiting.done(connection)
        if status in again:
            raise Failed(f"answered {status}: {said(text)}")
        if status != 200:
            raise Refused(status, said(text))
        try:
            return json.loads(text)
        except ValueError:
            return text.decode(errors="replace")


def together(jobs: Sequence[Callable[[Waiting], T]], at_once: int, *, stoppable: bool = True) -> list[T]:
    """Run jobs on threads, and return what they return, in their order; the first that fails ends the others.

    Args:
        jobs: each gets what it has to give its connections to.
        at_once: most threads.
        stoppable: whether a wish to stop is heard; not at the end, where it was.

    Raises:
        StopRequested: on a wish to stop, requests hung up.
        Exception: what the first job that failed raised.
    """
    waiting, todo = Waiting(), queue.SimpleQueue[int]()
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    left = threading.Semaphore(0)
    for number in range(len(jobs)):
        todo.put(number)

    def work() -> None:
        while not waiting.over.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                break
            try:
                results[number] = jobs[number](waiting)
            except GivenUp:
                break
            except BaseException as error:
                errors.append(error)
                waiting.give_up()
        left.release()

    count = min(at_once, len(jobs))
    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(count):
            while not left.acquire(timeout=LISTEN):
                if stoppable:
                    check_stop()
            if errors:
                break
        if stoppable:
            check_stop()
    except BaseException:
        waiting.give_up()
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(jobs))]


def said(answer: bytes) -> str:
    """Return what an answer says, in a line: of vLLM's errors the message."""
    text = answer.decode(errors="replace")
    try:
        content = json.loads(text)
        error = content.get("error", content)
        text = error.get("message") or error.get("detail") or text
    except (ValueError, AttributeError):
        pass
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split()) or type(error).__name__
