"""Settings of sampling on servers: what an engine does not do is refused, and nothing is passed over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hydra_ppo.cli.flags import parse
from hydra_ppo.config.settings import PPOConfig, RolloutSettings, VLLMSettings
from hydra_ppo.errors import ConfigError

URL = "http://127.0.0.1:8000"
ON = {"engine": "vllm", "vllm": VLLMSettings(urls=[URL])}
REQUIRED = ["--model.name_or_path", "base", "--data.train", "rows.jsonl", "--run.output", "run"]


def test_todays_engine_is_the_default():
    plain = RolloutSettings()
    assert plain.engine == "native"
    assert not plain.recomputes
    assert plain.weight_cap is None
    assert RolloutSettings(recompute_logprobs=True, importance_cap=3.0).weight_cap == 3.0


def test_on_servers_log_probs_are_recomputed_and_weighed():
    found = RolloutSettings(**ON)
    assert found.recomputes
    assert found.weight_cap == 2.0
    assert replace(found, vllm=replace(found.vllm, importance_cap=None)).weight_cap is None


def test_flags_and_yaml(tmp_path):
    flags = [
        "--rollout.engine",
        "vllm",
        "--rollout.vllm.urls",
        f"[{URL}/v1/, https://host/path]",
        "--rollout.vllm.timeout",
        "5",
    ]
    config = parse(PPOConfig, "ppo", [*REQUIRED, *flags]).config
    assert config.rollout.vllm == VLLMSettings(urls=[URL, "https://host/path"], timeout=5.0)
    (tmp_path / "ppo.yaml").write_text(f"rollout: {{engine: vllm, vllm: {{urls: [{URL}], retries: 0, adapter_folder: ~/x}}}}\n")
    config = parse(PPOConfig, "ppo", [str(tmp_path / "ppo.yaml"), *REQUIRED]).config
    assert config.rollout.vllm.retries == 0
    assert not config.rollout.vllm.adapter_folder.startswith("~")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"engine": "vllm"},
            r"^rollout.vllm.urls=\[\] names no server, and rollout.engine='vllm' samples on one; start it as hydra-p",
        ),
        (
            {"vllm": VLLMSettings(urls=[URL])},
            r"^rollout.vllm.urls=\['http.*'\] is for rollout.engine='vllm', and engine is 'nat",
        ),
        ({"vllm": VLLMSettings(retries=1)}, r"^rollout.vllm.retries=1 is for rollout.engine='vllm'"),
        (
            ON | {"top_k": 5},
            "^top_k=5 makes a vLLM server draw from another distribution .*; leave top_k out, or use engine=native",
        ),
        (ON | {"top_p": 0.9}, "^top_p=0.9 makes a vLLM server"),
        (ON | {"min_new_tokens": 2}, "^min_new_tokens=2 makes a vLLM server"),
        (ON | {"repetition_penalty": 1.1}, "^repetition_penalty=1.1 makes a vLLM server"),
        (ON | {"weights": "merged-bf16"}, "^weights='merged-bf16' are copies in this process, and vLLM has weights of its own"),
        (ON | {"kv_cache": "int8"}, "^kv_cache='int8' is a cache of this process, and vLLM has its own; leave it at auto"),
        (
            ON | {"importance_cap": 3.0},
            "^importance_cap=3.0 is the cap of engine=native; with vllm it is rollout.vllm.importance_cap",
        ),
    ],
    ids=str,
)
def test_what_an_engine_does_not_do_is_refused(changes, line):
    with pytest.raises(ConfigError, match=line):
        RolloutSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"urls": ["localhost:8000"]},
            r"^urls=\['localhost:8000'\] has 'localhost:8000', which is no address of a server; write http",
        ),
        ({"urls": ["http://"]}, "no address"),
        ({"urls": ["http://host:x"]}, "no address"),
        ({"urls": ["http://a b"]}, "no address"),
        ({"urls": ["http://me:secret@host"]}, "no address"),
        ({"urls": [URL, f"{URL}/v1"]}, f"names {URL} twice; name each server once"),
        ({"timeout": 0.0}, "^timeout=0.0 must be greater than 0"),
        ({"retries": -1}, "^retries=-1 must not be negative"),
        ({"importance_cap": 0.9}, "^importance_cap=0.9 must be at least 1"),
        ({"model": ""}, "^model='' is empty; name one, or leave it null"),
        ({"adapter_folder": ""}, "^adapter_folder='' is empty"),
    ],
    ids=str,
)
def test_what_they_may_be(changes, line):
    with pytest.raises(ConfigError, match=line):
        VLLMSettings(**changes)


def test_the_whole_name_is_said():
    with pytest.raises(ConfigError, match=r"^rollout.vllm.timeout=-1.0 must be greater than 0"):
        parse(PPOConfig, "ppo", [*REQUIRED, "--rollout.vllm.timeout", "-1"])
    with pytest.raises(ConfigError, match=r"^rollout.top_k=5 makes a vLLM server"):
        parse(
            PPOConfig, "ppo", [*REQUIRED, "--rollout.engine", "vllm", "--rollout.vllm.urls", f"[{URL}]", "--rollout.top_k", "5"]
        )
    with pytest.raises(ConfigError, match=r"^rollout.vllm.url is not a setting; did you mean rollout.vllm.urls\?"):
        parse(PPOConfig, "ppo", [*REQUIRED, "--rollout.vllm.url", URL])
