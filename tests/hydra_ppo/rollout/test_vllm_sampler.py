"""Sampling on servers: the same policy as here, versions of its adapter, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hydra_ppo.config.settings import LoraSettings, RolloutSettings, VLLMSettings
from hydra_ppo.data.text import StopStrings
from hydra_ppo.errors import ConfigError, NonFiniteError, ServerError, StorageError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import collect_experience
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.rollout.vllm import asking
from hydra_ppo.rollout.vllm.launch import RANKS, Launch, adapter_rank, served_rank
from hydra_ppo.rollout.vllm.look import Needs
from hydra_ppo.rollout.vllm.sampler import VLLMSampler
from hydra_ppo.runtime.interruption import StopRequested, stopping_on_signals
from tests.families import randomise
from tests.hydra_ppo.rollout.standin import standing_in
from tests.training import tokenizer

PROMPTS = [[1, 5, 6, 7], [1, 9, 10], [1, 11, 12, 13, 14], [1, 5, 6, 7]]
ENDS = [2, 20]
CLOSE = 1e-5
"""Nats: fp32 in another order of sums, rows alone there and together here."""


def rollout(*servers, timeout=5.0, retries=2, folder=None, **changes):
    urls = [server if isinstance(server, str) else server.url for server in servers]
    settings = {"batch_size": 4, "max_new_tokens": 8, "temperature": 0.7, "engine": "vllm"} | changes
    names = {} if folder is None else {"adapter_folder": str(folder)}
    return RolloutSettings(**settings, vllm=VLLMSettings(urls=urls, timeout=timeout, retries=retries, **names))


def needs(base="base", **changes):
    return Needs(**({"tokens": 20, "rank": 16, "model": None, "launch": Launch(str(base))} | changes))


def begun(model, settings, tmp_path, notes=None, prompts=PROMPTS):
    sampler = VLLMSampler(settings, tmp_path / "vllm", note=(notes if notes is not None else []).append)
    sampler.begin(model, prompts, needs())
    return sampler


def drawn(sampler, model, settings, seed=0, prompts=PROMPTS, **options):
    return sampler(model, prompts, settings, ENDS, torch.Generator().manual_seed(seed), **options)


def ours(model, prompts, responses, role="actor", temperature=0.7):
    rows = Experience.from_lists(prompts, responses, 0, model.device)
    with model.role(role), torch.no_grad():
        found = model.logprobs(rows.sequences(), temperature).logprobs
    return [row[: len(response)] for row, response in zip(found.tolist(), responses, strict=True)]


def assert_close(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)


# -- the same policy -----------------------------------------------------------------------------------------------------


def test_what_is_drawn_is_the_actors(server, model, tmp_path):
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings)
        assert_close(found.logprobs, ours(model, PROMPTS, found.responses))
        other = ours(model, PROMPTS, found.responses, role="reference")
        assert max(abs(a - b) for x, y in zip(found.logprobs, other, strict=True) for a, b in zip(x, y, strict=True)) > 0.01
        base = drawn(sampler, model, settings, role="reference")
        assert_close(base.logprobs, ours(model, PROMPTS, base.responses, role="reference"))
    assert all(len(ids) <= 8 and all(i not in ENDS for i in ids[:-1]) for ids in found.responses)
    asked = server.bodies("/v1/completions")
    assert {body["model"] for body in asked[-4:]} == {"base"}


def test_rows_do_not_depend_on_each_other_nor_on_who_samples(server, base, model, tmp_path):
    """The same seeds whatever is asked at once, and wherever; two answers to one prompt are drawn apart."""
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings)
        assert drawn(sampler, model, replace(settings, generation_batch_size=1)).responses == found.responses
        assert drawn(sampler, model, settings, seed=1).responses != found.responses
    assert found.responses[0] != found.responses[3]
    assert len({body["seed"] for body in server.bodies("/v1/completions")[2:6]}) == 4
    with standing_in(base) as second:
        both = rollout(server, second)
        with begun(model, both, tmp_path) as sampler:
            before = len(server.bodies("/v1/completions"))
            assert drawn(sampler, model, both).responses == found.responses
            assert len(server.bodies("/v1/completions")) - before == 2
            assert len(second.bodies("/v1/completions")) == 2 + 2  # two rows, after two of the probe
            assert list(server.adapters) == list(second.adapters)


def test_the_generator_goes_on(server, model, tmp_path):
    """A second rollout draws other rows, and a restored generator the same again."""
    settings, generator = rollout(server), torch.Generator().manual_seed(3)
    with begun(model, settings, tmp_path) as sampler:
        before = generator.get_state()
        first = sampler(model, PROMPTS, settings, ENDS, generator)
        assert sampler(model, PROMPTS, settings, ENDS, generator).responses != first.responses
        generator.set_state(before)
        assert sampler(model, PROMPTS, settings, ENDS, generator).responses == first.responses


def test_lengths_that_are_given_end_nothing_else(server, model, tmp_path):
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings, lengths=[3, 1, 8, 5])
    assert [len(ids) for ids in found.responses] == [3, 1, 8, 5]
    assert all(body["stop_token_ids"] == [] for body in server.bodies("/v1/completions")[-4:])


def test_tokens_that_stand_for_nothing_are_never_drawn(server, model, tmp_path):
    settings = rollout(server, temperature=5.0)
    never = list(range(4, 18))
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings, never=never)
    assert not {token for ids in found.responses for token in ids} & set(never)


def test_strings_end_a_response_where_they_are_complete(server, model, tmp_path):
    """By our own reading, also where a server goes on; where it reads what we do not, it has another tokenizer."""
    settings = rollout(server, temperature=3.0, max_new_tokens=20, stop=["w3 ", "w11"])
    strings = StopStrings(tokenizer(), settings.stop)
    with begun(model, settings, tmp_path) as sampler:
        plain = drawn(sampler, model, replace(settings, stop=[]))
        found = drawn(sampler, model, settings, stopped=strings)
        for whole, cut in zip(plain.responses, found.responses, strict=True):
            complete = strings([whole[:n] for n in range(1, len(whole) + 1)])
            assert cut == (whole[: complete.index(True) + 1] if True in complete else whole)
        assert any(len(a) > len(b) for a, b in zip(plain.responses, found.responses, strict=True))
        server.deaf = True
        again = drawn(sampler, model, settings, stopped=strings)
        assert again.responses == found.responses
        assert again.logprobs == found.logprobs
        server.changed = {"finish_reason": "stop", "token_ids": [25, 26], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
        with pytest.raises(ServerError, match="where our tokenizer reads none; serve the run's own tokenizer"):
            drawn(sampler, model, settings, stopped=strings)


def test_collecting_recomputes_weighs_and_watches(server, model, tmp_path):
    settings, notes = rollout(server), []
    with begun(model, settings, tmp_path, notes) as sampler:
        generator = torch.Generator().manual_seed(0)
        options = {"eos_ids": ENDS, "pad_id": 0, "generator": generator, "sampler": sampler, "where": "step=1"}
        found = collect_experience(model, PROMPTS, settings, **options)
        assert found.sampler_logprobs is not None
        assert (found.sampler_logprobs - found.old_logprobs).abs().max() < CLOSE
        assert len(notes) == 1  # what was seen
        server.changed = {"logprobs": {"token_logprobs": [-9.0] * 8}, "token_ids": [21] * 8, "finish_reason": "length"}
        for _ in range(2):
            collect_experience(model, PROMPTS, settings, **options)
    assert len(notes) == 2
    assert notes[1].startswith("step=1: log-probs of the vLLM servers are ")
    assert "up to 0.05 would be rounding" in notes[1]


def test_what_is_rounding_depends_on_the_types(model, base, server, tmp_path):
    with begun(model, rollout(server), tmp_path) as sampler:
        assert sampler.tolerance(model) == 0.02
        assert sampler.expected_drift(model) == 0.05
        sampler.seen = [replace(sampler.seen[0], dtype="bfloat16")]
        assert sampler.tolerance(model) == 0.15
        assert sampler.expected_drift(model) == 0.15
        sampler.seen = [replace(sampler.seen[0], dtype="float32", quantization="fp8")]
        assert sampler.tolerance(model) == 1.5
        sampler.apart = 0.3
        assert sampler.expected_drift(model) == 0.6


def test_a_quantised_base_of_ours_on_a_whole_one_there(base, server, tmp_path):
    """What the rounding makes is said, and what the actor may differ by follows from it."""
    model, notes = HydraModel.from_pretrained(base, quantization="nf4", dtype="fp32", check="off"), []
    randomise(model)
    settings = rollout(server)
    with begun(model, settings, tmp_path, notes) as sampler:
        assert 0.02 < sampler.apart < 1.5
        said = f"log-probs of 32 tokens of {server.url} are {sampler.apart:.2g} nats from ours: the rounding of the base"
        assert notes[1:] == [said]
        options = {"eos_ids": ENDS, "pad_id": 0, "generator": torch.Generator(), "sampler": sampler}
        found = collect_experience(model, PROMPTS, settings, **options)
        assert len(notes) == 2
    away = (found.sampler_logprobs - found.old_logprobs).abs()[found.response_mask]
    assert 0.01 < away.mean() < sampler.expected_drift(model)


def test_nothing_else_samples_for_another_engine(server, model):
    with pytest.raises(ConfigError, match=r"^rollout.engine='vllm' is not sampled here; hand PPOTrainer a VLLMSampler"):
        sample(model, PROMPTS, rollout(server), ENDS, torch.Generator())
    with pytest.raises(ConfigError, match="call begin before"):
        VLLMSampler(rollout(server), None, run=SimpleNamespace(resolve=lambda: "x"))(
            model, PROMPTS, rollout(server), ENDS, torch.Generator()
        )


# -- versions of adapters ------------------------------------------------------------------------------------------------


def test_each_change_is_a_version_with_a_name_of_its_own(server, model, tmp_path):
    settings, folder = rollout(server), tmp_path / "vllm"
    parameter = next(iter(model.role_parameters("actor").values()))
    before = parameter.detach().clone()
    try:
        with begun(model, settings, tmp_path) as sampler:
            names = []
            for version in range(4):
                drawn(sampler, model, settings)
                drawn(sampler, model, settings)  # nothing has changed
                names += list(server.adapters)
                assert len(server.adapters) == 1
                assert len(server.bodies("/v1/load_lora_adapter")) - 1 == version + 1
                assert sorted(path.name for path in folder.iterdir()) == sorted(names[-2:])
                with torch.no_grad():
                    parameter.add_(0.01)
        assert len(set(names)) == 4
        assert all("load_inplace" not in body for body in server.bodies("/v1/load_lora_adapter"))
        assert server.adapters == {}
        assert not folder.exists()
        # loaded before the one before it goes
        order = [path.split("/")[2].split("_")[0] for path, _ in server.asked if "lora_adapter" in path]
        assert order == ["load", "load", *["load", "unload"] * 3, "unload"]  # the first asks whether it can be done
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize(
    "options",
    [
        {"trunk_layers": 1},
        {"lora": LoraSettings(r=4, alpha=8, use_rslora=True)},
        {"lora": LoraSettings(target_modules=["q_proj", "down_proj"])},
    ],
    ids=str,
)
def test_adapters_of_any_shape(base, options, tmp_path, monkeypatch):
    model = HydraModel.from_pretrained(base, dtype="fp32", check="off", **options)
    randomise(model)
    with standing_in(base, **options) as server:
        settings = rollout(server)
        with begun(model, settings, tmp_path) as sampler:
            found = drawn(sampler, model, settings)
    assert_close(found.logprobs, ours(model, PROMPTS, found.responses))


def test_adapters_are_written_in_the_type_of_the_base(base, server, tmp_path):
    from safetensors.torch import load_file

    model = HydraModel.from_pretrained(base, dtype="bf16", check="off")
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        drawn(sampler, model, settings)
        (folder,) = (tmp_path / "vllm").iterdir()
        assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16


def test_a_reference_with_an_adapter_of_its_own(base, server, tmp_path):
    """What sft left is an adapter too; the base's name would be another policy."""
    sft = HydraModel.from_pretrained(base, dtype="fp32", check="off", train="sft")
    randomise(sft)
    sft.save_pretrained(tmp_path / "sft")
    model = HydraModel.from_pretrained(tmp_path / "sft", dtype="fp32", check="off")
    randomise(model, seed=5)
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings, role="reference")
        assert_close(found.logprobs, ours(model, PROMPTS, found.responses, role="reference"))
        drawn(sampler, model, settings)
        assert [name.split("-")[3] for name in server.adapters] == ["sft", "actor"]


def test_what_a_killed_process_left_is_cleared_and_nothing_of_others(server, model, tmp_path):
    settings = rollout(server, folder=tmp_path / "shared")
    killed = begun(model, settings, tmp_path)
    drawn(killed, model, settings)
    other = VLLMSampler(settings, tmp_path, run=tmp_path / "another run")
    other.begin(model, PROMPTS, needs())
    drawn(other, model, settings)
    (tmp_path / "shared" / "notes").mkdir()
    left = list(server.adapters)
    assert len(left) == 2
    again = begun(model, settings, tmp_path)
    assert list(server.adapters) == left  # nothing is touched before this run is the one that samples
    found = drawn(again, model, settings)
    assert found.responses == drawn(other, model, settings).responses
    assert left[0] not in server.adapters
    assert left[1] in server.adapters
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted([*server.adapters, "notes"])
    other.close()
    again.close()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["notes"]


def test_what_was_left_on_another_machine_is_cleared_from_the_runs_own_folder(server, model, tmp_path, monkeypatch):
    settings = rollout(server)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    drawn(begun(model, settings, tmp_path), model, settings)
    monkeypatch.undo()
    left = list(server.adapters)
    server.adapters["hydra-0-0-actor-v1"] = (str(tmp_path / "other" / "hydra-0-0-actor-v1"), {})  # of another run
    with begun(model, settings, tmp_path) as sampler:
        drawn(sampler, model, settings)
        assert left[0] not in server.adapters
        assert len(list((tmp_path / "vllm").iterdir())) == 1
    assert list(server.adapters) == ["hydra-0-0-actor-v1"]


def test_a_server_that_was_started_anew_gets_the_adapter_again(server, model, tmp_path):
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings)
        (name,) = server.adapters
        server.adapters.clear()
        assert drawn(sampler, model, settings).responses == found.responses
        assert list(server.adapters) == [name]


def test_an_adapter_that_is_not_taken(server, model, tmp_path):
    settings = rollout(server)
    line = (
        r"does not take the adapter in '.*' \(it answered 500: .*\); where it does not see that folder, name one in rollout.vl"
    )
    with begun(model, settings, tmp_path) as sampler:
        server.faults.append(("/v1/load_lora_adapter", {"status": 500}))
        with pytest.raises(ServerError, match=line):
            drawn(sampler, model, settings)
        assert len(server.bodies("/v1/load_lora_adapter")) == 2  # not asked again
        drawn(sampler, model, settings)
    assert server.adapters == {}


def test_a_folder_that_cannot_be_written(server, model, tmp_path):
    (tmp_path / "file").write_text("")
    settings = rollout(server, folder=tmp_path / "file" / "below")
    with (
        begun(model, settings, tmp_path) as sampler,
        pytest.raises(ServerError, match=r"^rollout.vllm.adapter_folder=.*cannot be"),
    ):
        drawn(sampler, model, settings)


def test_a_disk_that_is_full(server, model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hydra_ppo.rollout.vllm.adapters.write_adapter", full)
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler, pytest.raises(StorageError, match=r"cannot be written \(No space left"):
        drawn(sampler, model, settings)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "a bias"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "adapters on parameters of experts"),
        ({"modules_to_save": ["lm_head"]}, "layers of its own"),
        ({"layer_replication": [[0, 2]]}, "repeated layers"),
    ],
)
def test_adapters_that_cannot_be_served(options, what):
    with pytest.raises(
        ConfigError, match=rf"^rollout.engine='vllm' cannot sample from an adapter with {what} \({next(iter(options))}"
    ):
        adapter_rank({"r": 8} | options)


def test_ranks():
    assert [served_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    assert adapter_rank({"r": 8, "rank_pattern": {"q_proj": 24}}) == 24
    with pytest.raises(ConfigError, match=f"^model.lora.r=513 is a rank above {RANKS[-1]}"):
        adapter_rank({"r": 513})


# -- what goes wrong on the way ------------------------------------------------------------------------------------------


def test_a_request_that_failed_is_sent_again(server, model, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 30.0)
    monkeypatch.setattr(asking.Waiting, "pause", lambda self, seconds: pauses.append(seconds))
    settings = rollout(server, timeout=60.0, retries=3)
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings)
        asked = len(server.bodies("/v1/completions"))
        for fault in ({"status": 503}, {"drop": True}, {"status": 429}):
            server.faults.append(("/v1/completions", fault))
        assert drawn(sampler, model, replace(settings, generation_batch_size=1)).responses == found.responses
        assert len(server.bodies("/v1/completions")) - asked == 4 + 3
    assert pauses == [1.0, 2.0, 4.0]


def test_a_request_that_hangs_is_sent_again(server, model, tmp_path):
    settings, later = rollout(server, timeout=60.0), threading.Event()
    with begun(model, settings, tmp_path) as sampler:
        found = drawn(sampler, model, settings)
        sampler.servers = [replace(sampler.servers[0], timeout=0.5, retries=50)]
        server.faults.append(("/v1/completions", {"until": later}))
        assert drawn(sampler, model, settings).responses == found.responses
        later.set()


def test_pauses_grow_and_end(server, model, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 6.0)
    monkeypatch.setattr(asking.Waiting, "pause", lambda self, seconds: pauses.append(seconds))
    settings = rollout(server, retries=5)
    with begun(model, settings, tmp_path) as sampler:
        server.faults += [("/v1/completions", {"status": 502})] * 100
        with pytest.raises(ServerError, match=r"answered 502: as laid down, asked 6 times; start it again"):
            drawn(sampler, model, settings, prompts=PROMPTS[:1])
    assert pauses == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_server_that_is_silent(server, model, tmp_path):
    settings, later = rollout(server, timeout=60.0), threading.Event()
    with begun(model, settings, tmp_path) as sampler:
        drawn(sampler, model, settings)
        sampler.servers = [replace(sampler.servers[0], timeout=0.3, retries=0)]
        server.faults.append(("/v1/completions", {"until": later}))
        with pytest.raises(ServerError, match=r"was silent for 0.3 s, asked once; .* raise rollout.vllm.timeout or"):
            drawn(sampler, model, settings)
        later.set()


def test_a_server_that_is_gone(base, model, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 0.0)
    with standing_in(base) as server:
        settings = rollout(server)
        sampler = begun(model, settings, tmp_path)
    with pytest.raises(ServerError, match=rf"^vLLM server {server.url} cannot be asked \(Connection refused\), asked 3 times"):
        drawn(sampler, model, settings)
    sampler.close()
    assert not (tmp_path / "vllm").exists()


def test_a_refusal_is_one_line(server, model, tmp_path):
    settings = rollout(server)
    with begun(model, settings, tmp_path) as sampler:
        server.faults += [("/v1/completions", {"status": 400, "body": {"error": {"message": "max_tokens\nis too large"}}})]
        with pytest.raises(
            ServerError, match=r"refuses a request \(it answered 400: max_tokens is too large\); hydra-ppo serve"
        ):
            drawn(sampler, model, settings)


@pytest.mark.parametrize(
    ("changed", "kind", "line"),
    [
        ({"token_ids": None}, ServerError, "speaks another version|gave no whole response"),
        ({"logprobs": None}, ServerError, "speaks another version: its answer lacks token_ids"),
        ({"prompt_token_ids": [1]}, ServerError, r"went on from another prompt \(1 tokens for"),
        ({"token_ids": [99] * 8}, ServerError, r"a token that the model does not have \(99 of 32\); it serves another base"),
        ({"token_ids": [21] * 3, "finish_reason": "length"}, ServerError, "after 3 of 8 tokens, where nothing of ours ends it"),
        ({"finish_reason": "abort"}, ServerError, "broke a response off .finish_reason='abort'"),
        ({"token_ids": [21] * 7 + [None]}, ServerError, r"a token that the model does not have \(None of 32\)"),
        ({"token_ids": []}, ServerError, "gave no whole response"),
        ({"logprobs": {"token_logprobs": [-9999.0] * 8}}, NonFiniteError, "are nan or infinite"),
        ({"logprobs": {"token_logprobs": [None] * 8}}, NonFiniteError, "are nan or infinite"),
    ],
    ids=str,
)
def test_answers_of_which_no_response_can_be_made(changed, kind, line, server, model, tmp_path):
    settings = rollout(server)
    count = len(changed.get("token_ids") or [21] * 8)
    whole = {"token_ids": [21] * 8, "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0] * count}}
    with begun(model, settings, tmp_path) as sampler:
        server.changed = whole | changed
        with pytest.raises(kind, match=line):
            drawn(sampler, model, settings)


def test_a_wish_to_stop_is_heard_while_a_server_is_waited_for(server, model, tmp_path):
    """One that does not answer before the stop is over."""
    settings, later = rollout(server, timeout=60.0), threading.Event()
    with begun(model, settings, tmp_path) as sampler:
        drawn(sampler, model, settings)
        asked = len(server.bodies("/v1/completions"))
        server.faults += [("/v1/completions", {"until": later})] * 4

        def stop():
            while len(server.bodies("/v1/completions")) < asked + 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop).start()
        with stopping_on_signals(), pytest.raises(StopRequested):
            drawn(sampler, model, settings)
    assert server.adapters == {}
    assert not (tmp_path / "vllm").exists()
    later.set()
    deadline = time.monotonic() + 60
    while server.hung_up < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.hung_up == 4  # a server drops a request whose asker has gone


def test_a_wish_to_stop_is_heard_between_two_tries(server, model, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "LONGEST_PAUSE", 30.0)
    settings = rollout(server, retries=9)
    with begun(model, settings, tmp_path) as sampler:
        server.faults += [("/v1/completions", {"status": 503})] * 99
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with stopping_on_signals(), pytest.raises(StopRequested):
            drawn(sampler, model, settings)
        assert time.monotonic() - began < 60  # the pauses alone are longer
        server.faults.clear()
