"""The page that is served: fresh each time, to this machine alone."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading

import pytest

from hydra_ppo.errors import ConfigError
from hydra_ppo.report.live import Server
from tests.hydra_ppo.report.runs import logged, write_run


def ask(port: int, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.fixture
def served():
    texts = iter(f"content {number}" for number in range(9))
    with Server(0, lambda: "<page>", lambda: next(texts)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_each_answer_is_made_anew(served):
    status, text, headers = ask(served, "/")
    assert (status, text, headers["Content-Type"], headers["Cache-Control"]) == (
        200,
        "<page>",
        "text/html; charset=utf-8",
        "no-store",
    )
    assert [ask(served, "/content")[1] for _ in range(2)] == ["content 0", "content 1"]


def test_nothing_else_is_answered(served):
    assert ask(served, "/../state.json")[0] == 404
    assert ask(served, "/config.yaml")[0] == 404
    assert ask(served, "/", method="POST")[0] == 501
    assert ask(served, "/", host="evil.example")[0] == 403  # a name of somebody else that leads to this machine
    assert ask(served, "/", host="localhost")[0] == 200


def test_a_port_that_is_taken_is_refused(served):
    with pytest.raises(ConfigError, match=rf"^live={served} cannot be served \(.*\); choose another port\.$"):
        Server(served, str, str)


def test_from_the_command_line_until_ctrl_c(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    command = [sys.executable, "-m", "hydra_ppo", "report", str(run), "--live", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(line.split(":")[2].split("/")[0])
        status, text, _ = ask(port, "/")
        assert status == 200
        assert "connect-src 'self'" in text
        assert "step 12" in ask(port, "/content")[1]
        with (run / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": 13, "objective/scores": {logged(13)["objective/scores"]}}}\n')
        assert "step 13" in ask(port, "/content")[1]
        (run / "state.json").unlink()
        assert ask(port, "/content")[0] == 503
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "Ended.\n"
    assert process.returncode == 0
