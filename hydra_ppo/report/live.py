"""A page that is made anew each time it is asked for, served to this machine alone."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hydra_ppo.errors import ConfigError, HydraError

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Serves a page at `/` and what is in it at `/content`.

    Args:
        port: 0 takes a free one.
        page, content: make them.

    Raises:
        ConfigError: where the port is taken or may not be.
    """

    daemon_threads = True
    allow_reuse_address = False  # two pages on one port would take turns

    def __init__(self, port: int, page: Callable[[], str], content: Callable[[], str]) -> None:
        self.makers = {"/": page, "/content": content}
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"live={port} cannot be served ({reason}); choose another port.") from None

    @property
    def address(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer with a page; only names of this machine are answered, so that no other site can read it under its own."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        make = self.server.makers.get(self.path)
        if host not in (HOST, "localhost"):
            self._answer(403, "Only 127.0.0.1 and localhost are answered.")
        elif make is None:
            self._answer(404, "There is nothing here.")
        else:
            try:
                text = make()
            except HydraError as error:  # the run is being cleared, or has gone
                self._answer(503, str(error))
            else:
                self._answer(200, text, "text/html")

    def _answer(self, code: int, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: each refresh would be a line."""
