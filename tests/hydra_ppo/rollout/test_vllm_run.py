"""Runs of `hydra-ppo ppo` that sample on a server: stopped, failed, killed and gone on with to the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hydra_ppo.cli import rollouts
from hydra_ppo.cli.doctor_model import examine_model
from hydra_ppo.cli.main import main
from hydra_ppo.rollout.vllm import asking
from hydra_ppo.rollout.vllm.adapters import Adapters
from hydra_ppo.rollout.vllm.sampler import VLLMSampler
from tests.faults.project import assert_same, make_project, merge, ppo_settings, records, write
from tests.hydra_ppo.rollout.standin import standing_in
from tests.ranks import Ranks

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"), initializer_range=0.2)


@pytest.fixture(scope="module")
def here(project):
    with standing_in(project / "base") as server:
        yield server


@pytest.fixture
def there(here, monkeypatch):
    here.adapters.clear()
    here.asked.clear()
    here.faults.clear()
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 0.0)
    return here


def settings(project, server, output="run", **changes):
    """Settings of three steps with evaluations, stop strings and two answers to each prompt."""
    vllm = {"urls": [server.url], "timeout": 10.0, "retries": 1}
    rollout = {"engine": "vllm", "vllm": vllm, "batch_size": 4, "samples_per_prompt": 2}
    rollout |= {"temperature": 0.8, "stop": ["w3 w"]}
    few = {"rollout": rollout, "data": {"max_prompt_tokens": 8}, "steps": 3, "eval_every": 2, "eval_prompts": 2}
    few |= {
        "model": {"check": "off"},
        "reward": {"isolation": "thread"},
        "ppo_epochs": 2,
        "minibatch_size": 4,
        "microbatch_size": 4,
    }
    return merge(ppo_settings(project, output, **few), changes)


def go(project, server, output="run", *options, **changes):
    path = write(project / f"{Path(output).name}.yaml", settings(project, server, output, **changes))
    return main(["ppo", path, *options])


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take longer than a step here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra_ppo.runs.plots.plot_run", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def whole(project, here):
    """A run that nothing happened to."""
    here.asked.clear()
    assert go(project, here, "whole") == 0
    return project / "whole"


def test_a_run_on_a_server(project, here, whole):
    first = records(whole)[1]  # after the evaluation before training
    assert first["rollout/importance_weight"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/importance_max"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/importance_truncated"] == 0
    assert 0 <= first["rollout/sampler_kl"] < 1e-9
    assert 0 <= first["rollout/drift_max"] < 1e-5
    log = (whole / "log.txt").read_text()
    assert f"rollout.engine=vllm: vLLM 0.32.0 at {here.url} serves" in log
    assert "nats per token away" not in log
    # three steps change the actor three times; the evaluation after a step samples from what the next step does
    loads = [body["lora_name"] for body in here.bodies("/v1/load_lora_adapter") if body]
    assert [name.rsplit("-", 1)[1] for name in loads] == ["v1", "v2", "v3", "v4"]
    assert here.adapters == {}
    assert not (whole / rollouts.VLLM).exists()
    rows = [body for body in here.bodies(COMPLETIONS) if body["stop_token_ids"]]
    assert len(rows) == 3 * 4 + 3 * 2
    assert all(body["stop"] == ["w3 w"] for body in rows)
    assert len({body["seed"] for body in rows}) == 3 * 4 + 2  # evaluations draw with the same seeds


def test_the_drift_of_a_wrong_adapter_is_one_line(project, there, tmp_path, monkeypatch, capsys):
    """A server that does not take versions in is seen at the first step of which the actor is another."""
    plain, first = Adapters._load, []

    def stale(self, server, name, waiting):
        first.append(name)
        plain(self, server, name, waiting)
        there.adapters[name] = there.adapters.setdefault(first[0], there.adapters[name])

    monkeypatch.setattr(Adapters, "_load", stale)
    monkeypatch.setattr("hydra_ppo.rollout.vllm.adapters.Adapters._unload", lambda *_: None)
    assert go(project, there, str(tmp_path / "stale"), optimizer={"learning_rate": 3e-2}, eval_every=0) == 0
    lines = [line for line in (tmp_path / "stale" / "log.txt").read_text().splitlines() if "nats per token away" in line]
    assert len(lines) == 1
    assert "step=2: log-probs of the vLLM servers are" in lines[0]
    capsys.readouterr()


def test_a_server_that_fails_loses_nothing(project, there, whole, tmp_path, capsys):
    """What was done before is saved, with nothing due; the rest gives the bits of a run that nothing happened to."""
    run = tmp_path / "run"
    served = 2 + 2 + 4 + 2  # probe, evaluation, and into the second step
    there.faults += [(COMPLETIONS, {})] * served + [(COMPLETIONS, {"status": 503})] * 999
    assert go(project, there, str(run), run={"save_every": 0}) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        f"vLLM server {there.url} answered 503: as laid down, asked twice".replace("asked twice", "asked 2 times")
    )
    assert "start it again (hydra-ppo serve says how) and go on with --resume" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert there.adapters == {}
    there.faults.clear()
    assert go(project, there, str(run), "--resume", run={"save_every": 0}) == 0
    assert_same(run, whole)


def test_a_stop_while_rows_are_drawn(project, there, whole, tmp_path, monkeypatch, capsys):
    run, plain = tmp_path / "run", VLLMSampler._response
    count = iter(range(99))

    def stopping(self, server, body, waiting):
        if next(count) == 2 + 4 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, server, body, waiting)

    monkeypatch.setattr(VLLMSampler, "_response", stopping)
    assert go(project, there, str(run)) == 0
    assert "Stopped. Go on with: hydra-ppo ppo" in capsys.readouterr().out
    assert there.adapters == {}
    assert not (run / "vllm").exists()
    monkeypatch.undo()
    assert go(project, there, str(run), "--resume") == 0
    assert_same(run, whole)


def test_a_killed_run_goes_on_under_other_names(project, there, whole, tmp_path, monkeypatch, capsys):
    """What a process leaves that had no time to take leave: a loaded adapter and its folder."""
    run, plain = tmp_path / "run", VLLMSampler.__call__
    count = iter(range(99))

    def dying(self, *arguments, **options):
        if next(count) == 3:  # evaluation, two steps, and the evaluation between them
            raise RuntimeError("killed")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(VLLMSampler, "__call__", dying)
    monkeypatch.setattr(VLLMSampler, "close", lambda self: None)
    assert go(project, there, str(run)) == 1
    left = list(there.adapters)
    assert len(left) == 1
    assert len(list((run / "vllm").iterdir())) == 2
    monkeypatch.undo()
    assert go(project, there, str(run), "--resume") == 0
    assert_same(run, whole)
    assert there.adapters == {}
    assert not (run / "vllm").exists()
    names = [body["lora_name"] for body in there.bodies("/v1/load_lora_adapter") if body]
    assert len(set(names)) == len(names)


def test_another_server_may_go_on(project, there, whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert go(project, there, str(run), steps=1) == 0
    with standing_in(project / "base") as other:
        urls = {"urls": [there.url, other.url], "adapter_folder": str(tmp_path / "shared"), "timeout": 20.0, "retries": 3}
        assert go(project, there, str(run), "--resume", rollout={"vllm": urls}) == 0
        assert other.bodies(COMPLETIONS)
    assert_same(run, whole, without=("eval",))
    capsys.readouterr()
    assert go(project, there, str(run), "--resume", steps=4, rollout={"vllm": {"importance_cap": 3.0}}) == 2
    assert "rollout.vllm.importance_cap was 2.0, is 3.0" in capsys.readouterr().err


def test_what_is_left_goes_with_a_run_that_is_replaced(project, there, tmp_path):
    run = tmp_path / "run"
    assert go(project, there, str(run), steps=1) == 0
    left = run / "vllm" / "hydra-0-actor-v1"
    left.mkdir(parents=True)
    (left / "adapter_config.json").write_text("{}")
    plain = ppo_settings(project, str(run), steps=1, reward={"isolation": "thread"})  # which has no servers
    assert main(["ppo", write(tmp_path / "plain.yaml", plain), "--run.overwrite", "true"]) == 0
    assert not (run / "vllm").exists()


def test_a_run_answers_without_its_servers(whole, here, capsys):
    """`hydra-ppo generate` samples here, also where the run did not."""
    before = len(here.asked)
    for options in ([], ["--temperature", "0"]):
        assert main(["generate", str(whole), "--prompt", "w1 w2", *options]) == 0
        assert "actor: 1 answers" in capsys.readouterr().out
    assert len(here.asked) == before


def test_the_doctor_looks_at_the_servers_of_a_run(whole, there):
    """With the command that starts one as the hint, where there is a problem."""
    found = {finding.name: finding for finding in examine_model(str(whole))}
    assert found["vLLM server"].value.startswith(f"vLLM 0.32.0 at {there.url} serves")
    there.runtime = False
    try:
        last = examine_model(str(whole))[-1]
    finally:
        there.runtime = True
    assert (last.name, last.state) == ("vLLM servers", "problem")
    assert (
        last.value
        == f"failed: rollout.vllm.urls: {there.url} takes no adapters while it runs (VLLM_ALLOW_RUNTIME_LORA_UPDATING is not 1)"
    )
    assert last.hint.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 python -m vllm")


def test_a_dry_run_looks_at_the_server(project, there, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert go(project, there, str(tmp_path / "run"), "--dry-run") == 0
    assert f"vLLM 0.32.0 at {there.url} serves" in capsys.readouterr().out
    there.longest = 12
    try:
        for options in (["--dry-run"], []):
            monkeypatch.setattr("hydra_ppo.cli.commands.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
            assert go(project, there, str(tmp_path / "run"), *options) == 2
            line = capsys.readouterr().err.strip()
            assert line.startswith(f"rollout.vllm.urls: {there.url} takes 12 tokens (--max-model-len)")
            assert f"--model {project / 'base'} " in line
            assert f"--port {there.server_port} --dtype float32 --max-model-len 13 --max-lora-rank 16" in line
            assert "\n" not in line
    finally:
        there.longest = 64
    assert there.bodies(COMPLETIONS) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shard", [True, pytest.param(False, marks=pytest.mark.long)])
def test_two_processes_on_a_server(project, there, tmp_path, shard):
    """Rank 0 asks, both get the answers; a base that is shared out makes its passes on both."""
    changes = {"model": {"shard_base": shard}, "rollout": {"score_batch_size": 2}, "microbatch_size": 2, "steps": 1}
    assert go(project, there, str(tmp_path / "one"), **merge(changes, {"model": {"shard_base": False}})) == 0
    path = write(tmp_path / "two.yaml", settings(project, there, str(tmp_path / "two"), **changes))
    ranks = Ranks(["ppo", path], tmp_path / "logs")
    assert ranks.wait() == [0, 0], ranks.said()
    assert records(tmp_path / "two", "samples.jsonl") == records(tmp_path / "one", "samples.jsonl")
    (_, one), (_, two) = records(tmp_path / "one"), records(tmp_path / "two")
    for name, value in one.items():
        assert two[name] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)), name
    assert ranks.said()[1] == ""
    assert there.adapters == {}
