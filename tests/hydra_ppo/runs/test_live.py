"""The page that is served: on loopback, to who asks by that name, for its own pages, and nothing else."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest

from hydra_ppo.cli.main import main
from hydra_ppo.report.live import open_server
from tests.pages import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def port(run) -> Iterator[int]:
    with open_server([run], 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def test_it_serves_a_page_and_what_is_new_in_it(port, run):
    status, headers, page = ask(port)
    assert status == 200
    assert "connect-src 'self'" in page
    assert 'data-part="charts"' in page
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Frame-Options"] == "DENY"
    found = json.loads(ask(port, "/parts")[2])
    assert set(found["parts"]) == {"head", "alarms", "charts", "samples", "more"}
    assert found["problem"] == ""
    metrics = run / "metrics.jsonl"
    before = metrics.read_bytes()
    try:
        metrics.write_bytes(before + b'{"step": 99, "objective/scores": 42.5}\n{"st')
        assert "step 99: rollouts 42.5" in json.loads(ask(port, "/parts")[2])["parts"]["charts"]
        metrics.write_bytes(b"broken\n" + before)
        found = json.loads(ask(port, "/parts")[2])
        assert "line 1: not a JSON object" in found["problem"]
        assert "42.5" in found["parts"]["charts"]  # what was seen last
        assert ask(port)[0] == 503
    finally:
        metrics.write_bytes(before)
    assert "42.5" not in json.loads(ask(port, "/parts")[2])["parts"]["charts"]


@pytest.mark.parametrize("path", ["/state.json", "/../state.json", "/parts/", "/?x", "/index.html", "/%2e%2e/state.json"])
def test_it_serves_nothing_else(port, path):
    assert ask(port, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_it_is_only_read(port, method):
    assert ask(port, method=method)[0] == 501


def test_who_asks_by_another_name_is_refused(port):
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", "127.0.0.1:1"):
        status, _, content = ask(port, "/parts", Host=host)
        assert status == 403, host
        assert "plain tea" not in content
    assert ask(port, "/parts", Host=f"localhost:{port}")[0] == 200


def test_it_is_bound_to_loopback(run):
    with open_server([run], 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_one_line(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert main(["report", str(run), "--live", str(number)]) == 2
    said = f"live={number} cannot be served (Address already in use); choose another port, 0 takes a free one.\n"
    assert capsys.readouterr().err == said
    assert main(["report", str(run), "--live", "65536"]) == 2
    assert "is not a port, 0 to 65535" in capsys.readouterr().err
    assert main(["report", str(run / "no"), "--live", "0"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_ctrl_c_ends_it(run):
    command = [sys.executable, "-m", "hydra_ppo.cli", "report", str(run), "--live", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:")
    assert ask(int(line.split(":")[2].split("/")[0]))[0] == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "Stopped; the run, if it goes on, was not touched.\n", "")
