"""Starts real vLLM servers as a user would: `hydra-ppo serve BASE --start`, on the CPU, at loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_ppo.rollout.vllm.asking import Failed, Refused, Server, Waiting
from hydra_ppo.rollout.vllm.look import UNLOAD

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".vllm" / "bin" / "python"
PATIENCE = 600.0
"""Seconds that a server may take to come up; about one minute where nobody else uses the cores."""
FEW = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


class Real:
    """One server process.

    Attributes:
        url: its address.
        log: what it printed.
    """

    def __init__(self, subject: str | Path, log: Path, *options: str, port: int, more: tuple[str, ...] = ()) -> None:
        self.subject, self.log, self.options, self.port, self.more = str(subject), log, options, port, more
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it, wait until it answers, and return the seconds that took."""
        words = [
            sys.executable,
            "-m",
            "hydra_ppo.cli",
            "serve",
            self.subject,
            "--python",
            str(PYTHON),
            "--port",
            str(self.port),
        ]
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *self.options, "--start", "--", "--enforce-eager", *self.more],
                stdout=log,
                stderr=log,
                env=os.environ | FEW,
                start_new_session=True,
            )
        while True:
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() - began < PATIENCE, self.tail()
            try:
                Server(self.url, 5.0, 0).once(Waiting(), "/v1/models")
                return time.monotonic() - began
            except (Failed, Refused):
                time.sleep(0.5)

    def kill(self) -> None:
        """Kill it with all that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self) -> str:
        """Return the end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:]

    def get(self, path: str) -> object:
        """Ask it something."""
        return Server(self.url, 60.0, 0).once(Waiting(), path)

    def adapters(self) -> list[str]:
        """Return the names of loaded adapters."""
        cards = self.get("/v1/models")["data"]  # type: ignore[index]
        return [card["id"] for card in cards if card["parent"] is not None]

    def forget(self) -> None:
        """Unload all adapters."""
        for name in self.adapters():
            Server(self.url, 60.0, 0).once(Waiting(), UNLOAD, {"lora_name": name})


@contextmanager
def serving(subject: str | Path, folder: Path, *options: str, more: tuple[str, ...] = ()) -> Iterator[Real]:
    """Serve a run or a model, and kill the server at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Real(subject, folder / "server.log", *options, port=free_port(), more=more)
    try:
        print(f"\nup after {server.start():.0f} s: {server.url} serves {subject}", flush=True)
        yield server
    finally:
        server.kill()
