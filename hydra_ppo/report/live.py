"""Serves the page of runs on loopback while they go on: a page, and what is new in it. It reads, and only its own folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.report.page import parts, report_html
from hydra_ppo.report.record import read_runs
from hydra_ppo.runs.contents import ALARMS, CONFIG, METRICS, SAMPLES, STATE, SUMMARY

HOST = "127.0.0.1"
EVERY = 3.0
"""Seconds between two looks of a page at what is new."""
WATCHED = (STATE, METRICS, ALARMS, SAMPLES, SUMMARY, CONFIG)


class Pages:
    """The page of some runs and its parts, made anew once a file has changed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.port = 0
        self._seen: Any = None
        self._parts: dict[str, str] = {}
        self._lock = Lock()

    def whole(self) -> str:
        """Return the page. Raises as `read_runs` does."""
        return report_html(read_runs(self.folders), EVERY)

    def parts(self) -> str:
        """Return the parts as JSON, those of before with the reason where a run cannot be read now."""
        with self._lock:
            seen, problem = self._stamp(), ""
            if seen != self._seen:
                try:
                    self._parts = parts(read_runs(self.folders))
                    self._seen = seen
                except (HydraError, OSError) as error:
                    problem = " ".join(str(error).split())
            return json.dumps({"parts": self._parts, "problem": problem})

    def _stamp(self) -> list[tuple[int, int] | None]:
        return [_stamp(folder / name) for folder in self.folders for name in WATCHED]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def open_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Return a server of the pages of some runs, bound to loopback.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """
    pages = Pages(folders)
    try:
        server = ThreadingHTTPServer((HOST, port), _handler(pages))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no such port"
        raise ConfigError(f"live={port} cannot be served ({reason}); choose another port, 0 takes a free one.") from None
    server.daemon_threads, pages.port = True, server.server_port
    return server


def serve(folders: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serve the page of some runs until Ctrl-C.

    Raises:
        ConfigError: a folder holds no run, or the port cannot be used.
        DataError: the metrics of a run are broken.
    """
    read_runs(folders)  # what is wrong is said here, not in a browser
    with open_server(folders, port) as server:
        say(f"http://{HOST}:{server.server_port}/ shows it and renews itself; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Stopped; the run, if it goes on, was not touched.")


def _handler(pages: Pages) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "hydra-ppo"
        sys_version = ""
        timeout = 30

        def do_GET(self) -> None:
            port = pages.port
            # Another name for this address is a page of somebody else's that asks here: DNS rebinding.
            if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"Open http://{HOST}:{port}/ instead.\n")
            elif self.path == "/":
                try:
                    self._answer(HTTPStatus.OK, "text/html", pages.whole())
                except (HydraError, OSError) as error:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
            elif self.path == "/parts":
                self._answer(HTTPStatus.OK, "application/json", pages.parts())
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is / and no more.\n")

        def _answer(self, status: HTTPStatus, kind: str, content: str) -> None:
            body = content.encode("utf-8", errors="replace")
            self.send_response(status)
            for name, value in (
                ("Content-Type", f"{kind}; charset=utf-8"),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
                ("Referrer-Policy", "no-referrer"),
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing: what is asked for is the page's own business."""

    return Handler
