"""A reward server is asked as OpenRLHF asks one; what it does wrong is one line."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from hydra_ppo.config.settings import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, NonFiniteError, RewardError
from hydra_ppo.rewards import server as module
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import Scorer

WHERE = "step=7 phase=score"
GIVEN = Responses(
    prompts=["<user>2 + 2?", "<user>3 * 3?", "<user>1?"],
    texts=["4", "10", "1"],
    conversations=[None] * 3,
    columns=[{"answer": "4"}, {"answer": 9}, {}],
    ended=[True, False, True],
    queries=["<user>2 + 2?4<end>", "<user>3 * 3?10", "<user>1?1<end>"],
)


class Judge(BaseHTTPRequestHandler):
    """Says how long each query is, or what the test laid down: a status, a body, a time to wait."""

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        self.server.asked.append((self.path, self.headers["Content-Type"], asked))
        answer = self.server.answers.pop(0) if self.server.answers else {}
        time.sleep(answer.get("wait", 0))
        body = answer.get("body", json.dumps({"rewards": [len(query) for query in asked["query"]]})).encode()
        with contextlib.suppress(ConnectionError):  # who waited too long has gone
            self.send_response(answer.get("status", 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    server.asked, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/get_reward"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch):
    """Seconds between requests, which the tests do not wait for."""
    found = []
    monkeypatch.setattr(module, "sleep", found.append)
    return found


def scorer(url, **settings):
    return Scorer(RewardSettings(sources=[RewardSource("http", url, **settings)]), torch.device("cpu"))


def score(judge, **settings):
    return scorer(judge.url, **settings).score([], GIVEN, WHERE).total


def test_the_request_is_that_of_openrlhf(judge):
    assert score(judge, label="answer") == [18.0, 14.0, 14.0]
    assert judge.asked == [
        (
            "/get_reward",
            "application/json",
            {"query": GIVEN.queries, "prompts": GIVEN.prompts, "labels": ["4", 9, None]},
        )
    ]


def test_without_a_label_column_the_labels_are_empty(judge):
    score(judge)
    assert judge.asked[0][2]["labels"] == ["", "", ""]


def test_batches_keep_their_order(judge):
    assert score(judge, batch_size=2) == [18.0, 14.0, 14.0]
    assert [len(asked["query"]) for _, _, asked in judge.asked] == [2, 1]


def test_a_proxy_is_not_asked_for_what_is_near(judge, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert score(judge) == [18.0, 14.0, 14.0]


@pytest.mark.parametrize("status", sorted(module.AGAIN))
def test_what_may_pass_is_asked_again_after_longer_and_longer(judge, waits, status):
    judge.answers = [{"status": status}] * 3
    assert score(judge) == [18.0, 14.0, 14.0]
    assert waits == [1.0, 2.0, 4.0]
    assert len(judge.asked) == 4


def test_it_is_given_up_after_the_retries(judge, waits):
    judge.answers = [{"status": 503, "body": "the judge\nis busy"}] * 9
    with pytest.raises(RewardError) as caught:
        score(judge, retries=2)
    assert str(caught.value) == (
        f"{WHERE}: server {judge.url} answered 503 Service Unavailable: the judge is busy, asked 3 times; start it again, or "
        "raise timeout or retries."
    )
    assert waits == [1.0, 2.0]


def test_a_refusal_for_good_is_not_asked_again(judge, waits):
    judge.answers = [{"status": 404, "body": "no such path"}] * 2
    with pytest.raises(RewardError, match=r"answered 404 Not Found: no such path; mend the server, or its address"):
        score(judge)
    assert len(judge.asked) == 1


def test_a_silent_server(judge):
    judge.answers = [{"wait": 2}]
    with pytest.raises(RewardError, match=r"was silent for timeout=0.2 s, asked once; start it again, or raise timeout"):
        score(judge, timeout=0.2, retries=0)


def test_silence_is_asked_again(judge, waits):
    judge.answers = [{"wait": 2}]
    assert score(judge, timeout=0.2, retries=1) == [18.0, 14.0, 14.0]


def test_the_time_limit_of_a_batch_counts_all_tries(judge):
    judge.answers = [{"wait": 2}] * 9
    settings = RewardSettings(sources=[RewardSource("http", judge.url, timeout=0.2)], time_limit=0.6)
    with pytest.raises(RewardError, match=r"server http://\S+ took over reward.time_limit=0.6 s; mend the server or raise"):
        Scorer(settings, torch.device("cpu")).score([], GIVEN, WHERE)


def test_no_server_at_all(judge, waits):
    judge.shutdown()
    judge.server_close()
    with pytest.raises(RewardError, match=r"cannot be asked \(Connection refused\), asked 5 times; start it again"):
        score(judge)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>busy</html>", r"answered <html>busy</html>, which is no JSON; mend the server"),
        ("[1, 2, 3]", r'answered \[1, 2, 3\]; it must answer {"rewards": \[one number per response\]}'),
        ('{"score": [1, 2, 3]}', "; it must answer"),
        ('{"rewards": "123"}', "; it must answer"),
        ('{"rewards": {"a": 1}}', "; it must answer"),
        ('{"rewards": [1, 2]}', "returned 2 rewards for 3 responses; mend the server"),
        ('{"rewards": [1, null, 3]}', "it must return one number per response, and response 1 got None"),
        ('{"rewards": [1, "2", 3]}', "and response 1 got '2'"),
    ],
)
def test_an_answer_of_another_form(judge, body, message):
    judge.answers = [{"body": body}]
    with pytest.raises(RewardError, match=message):
        score(judge)
    assert len(judge.asked) == 1


def test_an_answer_that_is_no_number(judge):
    judge.answers = [{"body": '{"rewards": [1, NaN, 3]}'}]
    with pytest.raises(NonFiniteError, match=r"reward of server .* is nan for response 1"):
        score(judge)


def test_labels_of_no_column_are_refused(judge):
    with pytest.raises(ConfigError, match=r"label='gold' of reward target=.* is no column: the data has the columns answer;"):
        scorer(judge.url, label="gold").check(GIVEN.columns)
    scorer(judge.url, label="answer").check(GIVEN.columns)


@pytest.mark.parametrize(
    "url", ["judge:5000", "ftp://judge", "/judge", "http://", "http://judge:x/", "http://judge:0", "http://a b"]
)
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="write http://host:port/path"):
        scorer(url)
