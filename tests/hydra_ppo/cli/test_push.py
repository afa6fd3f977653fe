"""What is pushed: a model and its card, which tells nothing of this machine; the hub is a small one of the test."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
import yaml

from hydra_ppo.cli.main import main
from hydra_ppo.cli.model_card import data_name
from hydra_ppo.rollout.scoring import reward_scores
from tests.hydra_ppo.cli.test_export import EOS, words, write_run
from tests.run_folders import write_run as write_records
from tests.training import llama

REPO, BASE = "somebody/a-model", "maker/base-1b"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of ppo on a base in a folder, with records, and things in its folders that are nobody's business."""
    folder = tmp_path_factory.mktemp("made")
    model = write_run(folder, llama(), words())
    records, run = write_records(folder / "records"), folder / "ppo"
    for name in ("state.json", "metrics.jsonl", "summary.json", "samples.jsonl", "log.txt"):
        (run / name).write_bytes((records / name).read_bytes())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["eval/reward_accuracy"], lines[-1]["eval/reward_accuracy"] = 0.5, 0.75
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = yaml.safe_load((records / "config.yaml").read_text())
    config["data"] |= {"train": "../../alice/secret/pairs.jsonl", "eval": "owner/held-out"}
    config["reward"]["sources"] = [{"kind": "http", "target": "http://10.1.2.3:8000/score"}]
    config["run"]["project"] = "secret-project"
    config["kl"]["coef"] = 0.125
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    tokens = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"name_or_path": str(folder), "vocab_file": "/home/alice/v"})
    )
    for name in ("actor/notes.txt", "actor/optimizer.pt", "actor/.env"):
        (run / name).write_text(f"secret {TOKEN}")
    return folder, model


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_code(card: str, places: dict[str, Path]) -> tuple[dict, str]:
    """Run the card's Python, names of the hub replaced by folders; return its variables and what it printed."""
    code = re.search(r"```python\n(.*?)```", card, flags=re.S).group(1)
    assert len(code.splitlines()) <= 7
    for name, place in places.items():
        code = code.replace(repr(name), repr(str(place)))
    known: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, known)
    return known, said.getvalue()


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("role", ["actor", "reward"])
def test_a_folder_holds_a_model_that_the_card_loads(made, role, merged, tmp_path, capsys):
    folder, model = made
    out = tmp_path / "out"
    assert (
        push(folder / "ppo", "--repo", REPO, "--base", BASE, "--role", role, "--output", out, *["--merged"][: int(merged)]) == 0
    )
    said = capsys.readouterr().out
    assert said.endswith(f"Wrote what would be pushed to {out}; nothing was pushed.\n")
    assert ("left out: notes.txt" in said) == (role == "actor" and not merged)

    found = files(out)
    weights = {"config.json", "model.safetensors"} if merged else {"adapter_config.json", "adapter_model.safetensors"}
    more = {"generation_config.json"} if merged and role == "actor" else set()
    optional = {"special_tokens_map.json", "added_tokens.json"}
    assert set(found) - optional == {"README.md", *weights, *more, *TOKENIZER}
    for name, content in found.items():
        for secret in (str(folder), str(tmp_path), "alice", "secret", "10.1.2.3", "notes.txt", TOKEN):
            assert secret.encode() not in content, (name, secret)

    card = found["README.md"].decode()
    head = front(card)
    assert (head["base_model"], head["base_model_relation"]) == (BASE, "finetune" if merged else "adapter")
    assert (head["library_name"], head["pipeline_tag"]) == (
        "transformers" if merged else "peft",
        "text-generation" if role == "actor" else "text-classification",
    )
    assert ("| score on held-out prompts (`eval/scores`) | 0.25 | 1.25 | 1 ± 0.125 |" in card) == (role == "actor")
    assert ("| pairs ranked correctly (`eval/reward_accuracy`) | 0.5 | 0.75 | 0.25 |" in card) == (role == "reward")
    assert ("in &lt;eos&gt; (2), where the reward was trained" in card) == (role == "reward")
    assert "Data: `pairs.jsonl` and `owner/held-out`." in card
    assert "| `kl.coef` | 0.125 |" in card

    known, printed = run_code(card, {REPO: out, BASE: folder / "base"})
    loaded = known["model"].eval()
    if role == "reward":
        ids = known["tokenizer"](known["text"]).input_ids
        assert ids[-1] == EOS
        assert float(printed) == pytest.approx(reward_scores(model, [ids[:-1]], [[EOS]], [EOS], pad_id=0)[0], abs=1e-4)
    else:
        with torch.no_grad(), model.role("actor"):
            ours = model.causal_lm(input_ids=known["ids"]).logits
        with torch.no_grad():
            assert torch.allclose(loaded(input_ids=known["ids"]).logits, ours, atol=1e-4)
        assert printed.strip()


def test_a_chat_model_is_asked_as_one(made, tmp_path):
    folder, model = made
    run = tmp_path / "ppo"
    run.mkdir()
    for name, content in files(folder / "ppo").items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
    (tmp_path / "base").symlink_to(folder / "base")
    template = "{% for m in messages %}w1 {{ m['content'] }} <eos>\n{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    (run / "chat_template.jinja").write_text(template)
    for role in ("actor", "reward"):
        assert push(run, "--repo", REPO, "--merged", "--role", role, "--output", tmp_path / role) == 0
        card = (tmp_path / role / "README.md").read_text()
        assert "base_model" not in front(card)  # a folder of this machine
        assert "on `base`" in card or "and `base`" in card
        known, printed = run_code(card, {REPO: tmp_path / role})
        if role == "actor":
            assert known["tokenizer"].decode(known["ids"][0]).split()[-1] == "w2"
        else:
            ids = known["tokenizer"](known["text"], add_special_tokens=False).input_ids
            assert known["text"].startswith("w1 Why")
            assert float(printed) == pytest.approx(reward_scores(model, [ids[:-1]], [[EOS]], [EOS], pad_id=0)[0], abs=1e-4)


def test_a_checkpoint_tells_what_was_measured_by_then(made, tmp_path):
    folder, model = made
    run = tmp_path / "ppo"
    model.save_pretrained(run / "checkpoints" / "step-000004")
    for name in ("state.json", "metrics.jsonl", "summary.json", "config.yaml", *TOKENIZER):
        (run / name).write_bytes((folder / "ppo" / name).read_bytes())
    (run / "checkpoints" / "step-000004" / "optimizer.safetensors").write_bytes(b"moments")
    assert push(run / "checkpoints/step-000004", "--repo", REPO, "--base", BASE, "--output", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| score on held-out prompts (`eval/scores`) | - | 0.25 | - |" in card  # step 12 is not in it
    assert "optimizer.safetensors" not in files(tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "name"),
    [("owner/data:en", "owner/data:en"), ("../a/b", "b"), ("./pairs.jsonl", "pairs.jsonl"), ("/x/y/z.csv", "z.csv")],
)
def test_of_paths_only_the_last_part_is_told(source, name):
    assert data_name(source) == name


@dataclass
class Hub:
    """A hub that keeps what it is sent; `refuses` has a status by part of a path."""

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    there: list[str] = field(default_factory=lambda: [".gitattributes"])
    private: bool = False
    refuses: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def hub(monkeypatch):
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            path = self.path.partition("?")[0]
            state.requests.append((path, self.headers.get("Authorization", "")))
            for part, status in state.refuses.items():
                if part in path:
                    return self.answer({"error": "you may not write here"}, status)
            if path == "/api/whoami-v2":
                return self.answer({"name": "somebody", "type": "user"})
            if path == "/api/validate-yaml":  # the card's front
                return self.answer({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                state.created.append(json.loads(body))
                return self.answer({"url": f"{state.url}/{REPO}"})
            if path.startswith(f"/api/models/{REPO}/tree"):
                return self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in state.there])
            if "/preupload/" in path:
                names = [one["path"] for one in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                return self.answer({"files": modes})
            if "/commit/" in path:
                for line in body.splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        state.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                return self.answer({"commitUrl": f"{state.url}/{REPO}/commit/1", "commitOid": "1", "success": True})
            if path.startswith(f"/api/models/{REPO}"):
                return self.answer({"id": REPO, "private": state.private, "sha": "0", "siblings": []})
            return self.answer({"error": f"no {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", state.url)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield state
    server.shutdown()
    server.server_close()


def test_what_the_hub_is_sent_is_what_the_folder_holds(made, hub, tmp_path, capsys):
    folder, _ = made
    hub.private = True
    assert push(folder / "ppo", "--repo", REPO, "--base", BASE, "--output", tmp_path / "out") == 0
    assert hub.requests == []  # nothing is pushed
    before = sorted(path.name for path in folder.iterdir())
    assert push(folder / "ppo", "--repo", REPO, "--base", BASE, "--private") == 0
    assert hub.files == files(tmp_path / "out")
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"  # by the client's version
    # The client asks some things of its own without a token; all that concerns the repository has it, nobody another.
    assert {token for _, token in hub.requests} <= {"", f"Bearer {TOKEN}"}
    assert {token for path, token in hub.requests if REPO in path or "/repos/" in path} == {f"Bearer {TOKEN}"}
    said = capsys.readouterr()
    assert said.out.endswith(f"Pushed actor to {hub.url}/{REPO}\n")
    assert TOKEN not in said.out + said.err
    assert sorted(path.name for path in folder.iterdir()) == before  # what it was put together in is gone


@pytest.mark.parametrize(
    ("change", "arguments", "code", "says"),
    [
        ({"refuses": {"whoami": 401}}, [], 1, "failed at whoami (the hub answers 401"),
        ({"refuses": {"create": 403, "api/models": 404}}, [], 1, "failed at create_repo (the hub answers 403: you may not"),
        ({"refuses": {"commit": 403}}, [], 1, "failed at upload_folder (the hub answers 403"),
        ({"private": False}, ["--private"], 2, "--private: somebody/a-model is there and public"),
        ({"there": ["model.safetensors", "README.md"]}, [], 2, "holds model.safetensors, which would lie beside"),
    ],
    ids=["token", "rights", "commit", "public", "another model"],
)
def test_what_the_hub_refuses_is_one_line(made, hub, change, arguments, code, says, capsys):
    for name, value in change.items():
        setattr(hub, name, value)
    assert push(made[0] / "ppo", "--repo", REPO, "--base", BASE, *arguments) == code
    err = capsys.readouterr().err
    assert (err.count("\n"), says in err, TOKEN in err) == (1, True, False), err
    assert hub.files == {}
    assert not list(made[0].glob(".writing-push-*"))


def test_no_token_and_no_network_are_one_line(made, hub, monkeypatch, tmp_path, capsys):
    arguments = [made[0] / "ppo", "--repo", REPO, "--base", BASE]
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(*arguments) == 1
    err = capsys.readouterr().err
    assert (err.count("\n"), "failed at whoami (the hub cannot be reached, ConnectError)" in err) == (1, True), err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(*arguments) == 2
    err = capsys.readouterr().err
    assert err == "push needs a token of the hub; set HF_TOKEN or run hf auth login. --output DIR needs none.\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--repo", REPO], "stands on a base in a folder, 'base', which nobody else has; say with --base NAME/REPO"),
        (["--repo", "a-model"], "--repo='a-model' is no name on the hub; write NAME/REPO."),
        (["--repo", "../x"], "--repo='../x' is no name on the hub"),
        (["--repo", REPO, "--base", "/models/base"], "--base='/models/base' is no name on the hub"),
        (["--repo", REPO, "--base", BASE, "--private"], "--private is about a repo and --output writes a folder"),
        (["--repo", REPO, "--base", BASE, "--role", "actor_ema"], "role='actor_ema' is not in run="),
    ],
    ids=["base", "name", "dots", "path", "private", "role"],
)
def test_bad_input_is_one_line_and_leaves_nothing(made, arguments, says, tmp_path, capsys):
    assert push(made[0] / "ppo", "--output", tmp_path / "out", *arguments) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), says in err) == (1, True), err
    assert list(tmp_path.iterdir()) == []
