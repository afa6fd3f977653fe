"""A server is looked at before anything is sampled: what is wrong is one line, with the command that starts it right."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from hydra_ppo.errors import ConfigError
from hydra_ppo.rollout.vllm.asking import Server
from hydra_ppo.rollout.vllm.look import look
from hydra_ppo.rollout.vllm.sampler import VLLMSampler
from tests.hydra_ppo.rollout.standin import CONFIG
from tests.hydra_ppo.rollout.test_vllm_sampler import PROMPTS, needs, rollout

START = "start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server"


@pytest.fixture
def fresh(server):
    """A server that is put back to what it was."""
    before = {name: getattr(server, name) for name in ("runtime", "version", "longest", "key", "owner")}
    yield server
    for name, value in before.items():
        setattr(server, name, value)
    server.config = {name: dict(part) for name, part in CONFIG.items()}


def seen(server, **changes):
    return look(Server(server.url, 5.0, 0), needs(**changes))


def test_what_is_seen(fresh):
    found = seen(fresh)
    assert (found.version, found.base, found.dtype, found.told) == ("0.32.0", "base", "float32", True)
    assert found.root == str(fresh.base)
    assert str(found) == f"vLLM 0.32.0 at {fresh.url} serves {str(fresh.base)!r} in float32 as 'base'"


def change(group, name, value):
    def changing(server):
        if name is None:
            server.config[group] = value
        else:
            server.config[group][name] = value

    return changing


WRONG = {
    "raw log-probs": (change("model_config", "logprobs_mode", "raw_logprobs"), r"gives raw_logprobs \(--logprobs-mode\)"),
    "no adapters": (change("lora_config", None, None), r"serves no adapters \(--enable-lora is not on\)"),
    "rank": (
        change("lora_config", "max_lora_rank", 8),
        r"takes adapters up to rank 8, the actor's has 16 \(--max-lora-rank 16\)",
    ),
    "one adapter": (change("lora_config", "max_loras", 1), r"keeps 1 adapter \(--max-loras\)"),
    "some modules": (change("lora_config", "target_modules", ["q_proj"]), r"lets adapters sit on \['q_proj'\] alone"),
    "replicas": (change("parallel_config", "data_parallel_size", 2), r"runs 2 replicas \(--data-parallel-size\)"),
    "api servers": (change("parallel_config", "_api_process_count", 4), r"runs 4 replicas \(--api-server-count\)"),
    "defaults": (change("model_config", "generation_config", "auto"), r"takes defaults from a generation_config.json"),
    "short": (
        lambda server: setattr(server, "longest", 19),
        r"takes 19 tokens \(--max-model-len\), prompt and response may have 20",
    ),
    "fixed": (lambda server: setattr(server, "runtime", False), r"takes no adapters while it runs"),
    "another program": (
        lambda server: setattr(server, "owner", "llamacpp"),
        r"is no vLLM server: what it serves is owned by 'lla",
    ),
    "another version": (lambda server: setattr(server, "version", None), r"is no vLLM server: /version does not say which"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_the_right_command(name, fresh):
    spoil, line = WRONG[name]
    spoil(fresh)
    with pytest.raises(ConfigError, match=rf"^rollout.vllm.urls: {fresh.url} {line}") as error:
        seen(fresh)
    assert "\n" not in str(error.value)
    assert START in str(error.value)
    assert f" --host 127.0.0.1 --port {fresh.server_port} " in str(error.value)
    assert "--max-lora-rank 16 --max-loras 2 --logprobs-mode processed_logprobs --generation-config vllm" in str(error.value)


def test_a_base_of_another_name(fresh):
    with pytest.raises(
        ConfigError, match=rf"^rollout.vllm.model='other' is not what {fresh.url} serves, which is base; name one"
    ):
        seen(fresh, model="other")
    assert seen(fresh, model="base").base == "base"


def test_a_key(fresh, monkeypatch):
    fresh.key = "open sesame"
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"wants a key \(it answered 401: .*\); put it into the variable VLLM_API_KEY"):
        seen(fresh)
    monkeypatch.setenv("VLLM_API_KEY", "open sesame")
    assert seen(fresh).base == "base"


def test_nothing_listens():
    with socket.socket() as held_port:
        held_port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held_port.getsockname()[1]}"
    with pytest.raises(
        ConfigError, match=rf"^rollout.vllm.urls: {url} cannot be asked \(Connection refused\); start it with: "
    ):
        look(Server(url, 5.0, 3), needs())


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n\r\nhello", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.0 404 No\r\n\r\n", b""])
def test_something_else_listens(answer):
    class Other(BaseHTTPRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(answer)

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ConfigError, match=r"(is no vLLM server|cannot be asked \().*; start it with: "):
            look(Server(f"http://127.0.0.1:{other.server_port}", 5.0, 0), needs())
        other.shutdown()


# -- the first tokens ----------------------------------------------------------------------------------------------------


def begin(server, model, tmp_path, **changes):
    notes: list[str] = []
    VLLMSampler(rollout(server), tmp_path, note=notes.append).begin(model, PROMPTS, needs(**changes))
    return notes


def test_a_server_that_does_not_say_how_it_was_started(fresh, model, tmp_path):
    fresh.config = None
    notes = begin(fresh, model, tmp_path)
    assert notes[0] == f"rollout.engine=vllm: vLLM 0.32.0 at {fresh.url} serves {str(fresh.base)!r} as 'base'"
    assert notes[1].startswith(f"{fresh.url} does not say how it was started (VLLM_SERVER_DEV_MODE=1 makes it); rank,")


def test_the_rank_is_the_actors_own(fresh, model, tmp_path):
    fresh.config["lora_config"]["max_lora_rank"] = 8
    with pytest.raises(ConfigError, match="the actor's has 16"):
        begin(fresh, model, tmp_path, rank=4)


def test_another_base_is_known_by_its_tokens(fresh, model, tmp_path):
    """Name, folder and shapes are the same; one matrix is a little different."""
    weight = fresh.model.architecture.layers[0].mlp.down_proj.base_layer.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    try:
        with pytest.raises(
            ConfigError, match=rf"^rollout.vllm.urls: {fresh.url} serves another base than ours .* nats away"
        ) as error:
            begin(fresh, model, tmp_path)
        assert "up to 0.02 would be rounding; start it with: VLLM" in str(error.value)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert len(begin(fresh, model, tmp_path)) == 1


def test_log_probs_without_the_temperature_are_known_by_their_numbers(fresh, model, tmp_path):
    fresh.raw, fresh.config = True, None  # it does not say
    with pytest.raises(
        ConfigError, match=r"gives log-probs without the temperature, .*\(--logprobs-mode\); start it with: VLLM"
    ):
        begin(fresh, model, tmp_path)


def test_what_a_probe_shows_is_one_line(fresh, model, tmp_path):
    fresh.faults.append(("/v1/completions", {"status": 400, "body": {"error": {"message": "no\nlog-probs"}}}))
    with pytest.raises(
        ConfigError, match=rf"^rollout.vllm.urls: {fresh.url} does not answer a first prompt: 400: no log-probs\.$"
    ):
        begin(fresh, model, tmp_path)
    fresh.changed = {"token_ids": None}
    with pytest.raises(ConfigError, match=r"does not answer a first prompt: .*gave no whole response"):
        begin(fresh, model, tmp_path)


def test_every_server_is_looked_at(fresh, model, tmp_path):
    settings = rollout(fresh, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"^rollout.vllm.urls: http://127.0.0.1:9 cannot be asked"):
        VLLMSampler(settings, tmp_path).begin(model, PROMPTS, needs())


def test_an_adapter_that_cannot_be_served_is_refused_before_anything_is_asked(fresh, model, tmp_path, monkeypatch):
    config = model.base.peft_config["actor"]
    monkeypatch.setattr(config, "use_dora", True)
    with pytest.raises(ConfigError, match="cannot sample from an adapter with DoRA"):
        begin(fresh, model, tmp_path)
    assert fresh.asked == []
