"""A stand-in for a vLLM server: the same addresses and answers, with a HydraModel that reads the adapters it is given."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hydra_ppo.config.settings import LoraSettings, RolloutSettings
from hydra_ppo.data.text import StopStrings
from hydra_ppo.experience import Experience
from hydra_ppo.model.adapter_options import saved_options
from hydra_ppo.model.adapters import adapter_parameters, read_adapter
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.runtime.interruption import StopRequested
from tests.training import tokenizer

CONFIG: dict[str, Any] = {
    "model_config": {
        "dtype": "torch.float32",
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "quantization": None,
    },
    "lora_config": {"max_lora_rank": 16, "max_loras": 2, "target_modules": None},
    "parallel_config": {"data_parallel_size": 1, "_api_process_count": 1},
}
"""What a server says that `hydra-ppo serve` started, of 0.32.0."""


class StandIn(ThreadingHTTPServer):
    """One server.

    Attributes:
        config: what /server_info gives; None where it is not on.
        adapters: that are loaded, by name: folder and tensors.
        asked: all requests, path and content.
        faults: what happens to the next requests of a path in place of an answer: status, body, drop, until
            (an event that is waited for).
        hung_up: requests whose asker had gone when the answer was ready.
        runtime: whether adapters can be loaded.
        raw: whether log-probs leave the temperature out.
        deaf: whether strings end nothing.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, base: Path, port: int = 0, lora: LoraSettings | None = None, **options: Any) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.base = base
        self.model = HydraModel.from_pretrained(base, dtype="fp32", lora=lora, check="off", **options)
        self.tokenizer = tokenizer()
        self.config: dict[str, Any] | None = json.loads(json.dumps(CONFIG))
        self.adapters: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.faults: list[tuple[str, dict[str, Any]]] = []
        self.hung_up = 0
        self.runtime, self.version, self.longest, self.key = True, "0.32.0", 64, None
        self.owner, self.raw, self.deaf = "vllm", False, False
        self.lock = threading.Lock()
        self.errors: list[BaseException | None] = []
        self.changed: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str) -> list[Any]:
        """Return the contents of all requests to a path."""
        return [body for asked, body in self.asked if asked == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what went wrong, for the end of the test; a connection that broke is the other side's."""
        found = sys.exception()
        if not isinstance(found, ConnectionError | StopRequested):
            self.errors.append(found)

    def models(self) -> dict[str, Any]:
        card = {"object": "model", "owned_by": self.owner}
        base = {"id": "base", "root": str(self.base), "parent": None, "max_model_len": self.longest, **card}
        others = [{"id": name, "root": root, "parent": "base", **card} for name, (root, _) in self.adapters.items()]
        return {"object": "list", "data": [base, *others]}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return 400, error("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters:
            return 400, error(f"The lora adapter '{name}' has already been loaded. If you want to ..., set 'load_inplace'.")
        folder = Path(path)
        if not (folder / "adapter_config.json").is_file():
            return 404, error(f"Loading lora {name} failed: No adapter found for {path}")
        options = saved_options(folder)
        if self.config is not None and options.r > self.config["lora_config"]["max_lora_rank"]:
            return 500, error(f"LoRA rank {options.r} is greater than max_lora_rank 8.")
        with self.lock:
            assert isinstance(self.model.base, PeftModel)
            read_adapter(self.model.base, "actor", folder)
            found = {key: p.detach().clone() for key, p in adapter_parameters(self.model.base, "actor").items()}
        self.adapters[name] = (path, found)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, error(f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        with self.lock:
            found = self.adapters.get(name)  # once: another request may unload it
            if name != "base" and found is None:
                return 404, error(f"The model `{name}` does not exist.")
            if found is not None:
                for key, parameter in adapter_parameters(self.model.base, "actor").items():
                    parameter.copy_(found[1][key])
            ids, logprobs, reason = self._sample(body, name)
        choice = {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "finish_reason": reason,
            "logprobs": {"token_logprobs": logprobs},
        }
        return 200, {"object": "text_completion", "choices": [choice | self.changed]}

    def _sample(self, body: dict[str, Any], name: str) -> tuple[list[int], list[float], str]:
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        assert body["logprobs"] == 0
        settings = RolloutSettings(max_new_tokens=body["max_tokens"], temperature=body["temperature"])
        generator = torch.Generator().manual_seed(body["seed"])
        stop = StopStrings(self.tokenizer, body["stop"]) if body.get("stop") and not self.deaf else None
        never = [int(token) for token in body.get("logit_bias", ())]
        role = "actor" if name != "base" else "base"
        self.model.roles["base"] = type(self.model.roles["actor"])(None, "lm")
        found = sample(
            *(self.model, [body["prompt"]], settings, body["stop_token_ids"], generator), role=role, never=never, stopped=stop
        )
        (ids,), (logprobs,) = found.responses, found.logprobs
        if self.raw:
            rows = Experience.from_lists([body["prompt"]], [ids], 0, torch.device("cpu"))
            with self.model.role(role):
                logprobs = self.model.logprobs(rows.sequences(), 1.0).logprobs[0].tolist()
        ended = ids[-1] in body["stop_token_ids"] or (stop is not None and stop([ids])[0])
        return ids, logprobs, "stop" if ended else "length"


def error(message: str) -> dict[str, Any]:
    """Return an error as vLLM puts it."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((path, None))
        if self._fault(path):
            return
        if path == "/v1/models":
            self._answer(*((200, server.models()) if self._allowed() else (401, {"error": "Unauthorized"})))
        elif path == "/version":
            self._answer(200, {"version": server.version})
        elif path == "/server_info" and server.config is not None:
            self._answer(200, {"vllm_config": server.config, "vllm_env": {}, "system_env": {}})
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(length := int(self.headers.get("Content-Length", 0)))
        if not content or len(content) < length:  # who hung up before it had said all
            return
        body = json.loads(content)
        server.asked.append((self.path, body))
        if self._fault(self.path):
            return
        routes = {"/v1/completions": server.complete}
        if server.runtime:
            routes |= {"/v1/load_lora_adapter": server.load, "/v1/unload_lora_adapter": server.unload}
        if self.path not in routes:
            self._answer(404, {"detail": "Not Found"})
        elif not self._allowed():
            self._answer(401, {"error": "Unauthorized"})
        else:
            with contextlib.suppress(StopRequested):  # a signal reaches the whole process, which a real server is not in
                self._answer(*routes[self.path](body))

    def _allowed(self) -> bool:
        return self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def _fault(self, path: str) -> bool:
        """Do what was laid down for the next request of a path; say whether that was all."""
        number = next((i for i, (where, _) in enumerate(self.server.faults) if where == path), None)
        if number is None:
            return False
        fault = self.server.faults.pop(number)[1]
        if "until" in fault:
            fault["until"].wait(60)
        if self._is_alone():
            self.server.hung_up += 1
            return True
        if fault.get("drop"):
            self.close_connection = True
            return True
        if "status" in fault:
            self._answer(fault["status"], fault.get("body", {"error": {"message": "as laid down"}}))
            return True
        return False

    def _is_alone(self) -> bool:
        """Say whether the asker has gone."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    def _answer(self, status: int, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        with contextlib.suppress(ConnectionError):  # who waited too long has gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def standing_in(base: Path, port: int = 0, **options: Any) -> Iterator[StandIn]:
    """Run a stand-in on a port of its own, or on that one."""
    server = StandIn(base, port, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not server.errors, server.errors
