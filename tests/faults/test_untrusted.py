"""Folders that somebody else made: nothing of theirs runs, nothing is written outside, nothing is waited for."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_ppo.cli.main import main
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.runtime import time_limit
from tests.faults.project import make_project, ppo_settings, quick_first, write
from tests.faults.test_moved import write_judge

PLANTED = "raise SystemExit(open('EXPLODED', 'w').write('x'))\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, data, a judge, an sft run's model, and an adapter of PEFT."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    write_judge(folder / "judge", folder / "base")
    model = HydraModel.from_pretrained(folder / "base", train="sft")
    model.reward_head_trained = True
    model.save_pretrained(folder / "sft")
    for path in (folder / "base").glob("token*"):
        shutil.copy(path, folder / "sft" / path.name)
    shutil.copytree(folder / "sft" / "sft", folder / "adapter")
    return folder


@pytest.fixture
def home(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    for module in ("planted", "megatron"):  # the working directory is on the path
        (tmp_path / "home" / f"{module}.py").write_text(PLANTED)
    return tmp_path / "home"


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def cut_tensors(path):
    save_file({}, path, {"format": "pt"})


def options(**changes):
    return lambda home: edit(home / "adapter/adapter_config.json", **changes)


def manifest(**changes):
    return lambda home: edit(home / "sft/hydra.json", **changes)


def endless(home):
    loop = "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4
    edit(home / "base/tokenizer_config.json", chat_template=loop)
    rows = [{"prompt": [{"role": "user", "content": "w1 w2"}]}] * 4
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


OUT = {"adapters": ["../../out", "sft"], "roles": {"reference": {"adapter": "../../out", "head": "lm"}}}
ABSOLUTE = {"adapters": ["/tmp/out"], "roles": {"reference": {"adapter": "/tmp/out", "head": "lm"}}}
GONE = {"roles": {"reference": {"adapter": "gone", "head": "lm"}, "reward": {"adapter": "sft", "head": "reward"}}}
CODE = {"AutoConfig": "planted.Config", "AutoModelForSequenceClassification": "planted.Model"}
CODE_AS_MODEL = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
SFT, ADAPTER = {"model": {"name_or_path": "sft"}}, {"model": {"adapter": "adapter"}}
JUDGE = {"reward": {"sources": [{"kind": "classifier", "target": "judge"}]}}
CASES = {
    "an adapter named by a way out": (manifest(**OUT), SFT, "'../../out', which is no plain name"),
    "a module to import": (options(megatron_config={"a": 1}, megatron_core="planted"), ADAPTER, "megatron_"),
    "an endless chat template": (endless, {}, "the chat template takes over 0.5 s for one conversation"),
    "a pipe as config.json": (lambda home: pipe(home / "base/config.json"), {}, "config.json is not a regular file"),
    "a judge that brings code": (
        lambda home: (
            edit(home / "judge/config.json", auto_map=CODE, model_type="planted"),
            shutil.copy("planted.py", "judge/"),
        ),
        JUDGE,
        "judge",
    ),
    "a judge that brings a tokenizer's code": (
        lambda home: edit(home / "judge/tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.T", None]}),
        JUDGE,
        None,
    ),
    "a base that brings code": (
        lambda home: (
            edit(home / "base/config.json", auto_map=CODE_AS_MODEL, model_type="planted"),
            shutil.copy("planted.py", "base/"),
        ),
        {},
        "model.name_or_path='base'",
    ),
    "an adapter named absolutely": (manifest(**ABSOLUTE), SFT, "'/tmp/out', which is no plain name"),
    "a role whose adapter is not there": (
        manifest(**GONE),
        SFT,
        "role 'reference' uses adapter 'gone', which it does not list",
    ),
    "a format of later": (manifest(format=99), SFT, "format=99 is not the 1 that this version reads"),
    "roles that are numbers": (manifest(roles={"reference": {"adapter": 1, "head": 2}}), SFT, "holds values of other types"),
    "a manifest that is a pipe": (lambda home: pipe(home / "sft/hydra.json"), SFT, "hydra.json is not a regular file"),
    "an adapter without tensors": (
        lambda home: cut_tensors(home / "adapter/adapter_model.safetensors"),
        ADAPTER,
        "lacks 28 tens",
    ),
    "an adapter that is a pipe": (
        lambda home: pipe(home / "adapter/adapter_config.json"),
        ADAPTER,
        "holds no adapter_config.json",
    ),
    "PiSSA": (options(init_lora_weights="pissa"), ADAPTER, "init_lora_weights='pissa' changes the base"),
    "DoRA": (options(use_dora=True), ADAPTER, "use_dora=True rounds"),
    "another kind of adapter": (options(peft_type="IA3"), ADAPTER, "is of kind IA3; only LoRA adapters can be taken"),
    "an option that nobody knows": (
        options(brand_new={"x": 1}),
        ADAPTER,
        "brand_new={'x': 1} is no option of this version of PEFT",
    ),
    "an option of another type": (options(r="sixteen"), ADAPTER, "r='sixteen' is str, not int"),
    "targets that are nowhere": (options(target_modules=["nowhere"]), ADAPTER, "does not fit this base"),
    "an adapter's config nested too deeply": (
        lambda home: (home / "adapter/adapter_config.json").write_text("[" * 10**5 + "]" * 10**5),
        ADAPTER,
        "cannot be read",
    ),
    "weights that are a pipe": (lambda home: pipe(home / "base/model.safetensors"), {}, "is not a regular file"),
    "a tokenizer that is a pipe": (lambda home: pipe(home / "base/tokenizer.json"), {}, "is not a regular file"),
    "data that is a pipe": (lambda home: pipe(home / "pairs.jsonl"), {}, "is not a regular file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", quick_first(CASES, 6))
def test_one_line_and_nothing_of_theirs(name, home, monkeypatch, capsys, fault):
    spoil, changes, says = CASES[name]
    spoil(home)
    monkeypatch.setattr(time_limit.rendering_limit, "__wrapped__", time_limit.rendering_limit.__wrapped__)
    monkeypatch.setattr(time_limit.rendering_limit.__wrapped__, "__defaults__", (0.5,))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    begun = time.monotonic()
    settings = ppo_settings(home, "run", steps=1, eval_every=0, **changes)
    settings["model"]["name_or_path"] = changes.get("model", {}).get("name_or_path", "base")
    settings["data"]["train"] = "pairs.jsonl"
    path = write(home / "ppo.yaml", settings)
    for flags in (["--dry-run"], []):
        code = main(["ppo", path, *flags])
        said = capsys.readouterr().err.strip().splitlines()
        assert code == (0 if says is None else 2), said
        if says is not None:
            assert says in said[-1]
            assert not (home / "run").exists()
    assert not (home / "EXPLODED").exists()
    assert not (home.parent / "out").exists()
    assert threading.active_count() < 20
    fault(name, "one line, exit 2" if says else "read without its code", f"{time.monotonic() - begun:.1f} s")


def test_dropout_of_a_saved_adapter_is_said_and_off(home, caplog):
    options(lora_dropout=0.5)(home)
    with caplog.at_level("INFO", "hydra_ppo"):
        model = HydraModel.from_pretrained(home / "base", adapter=home / "adapter", train="ppo")
    assert "was trained with lora_dropout=0.5, which is 0 here" in caplog.text
    assert not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    assert load_file(home / "adapter/adapter_model.safetensors")
