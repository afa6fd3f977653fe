"""What the patch of ms-swift refuses, checked without ms-swift: arguments are plain namespaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches import swift
from hydra_ppo.patches.versions import HostError
from tests.training import write_model

DEFAULTS = {  # of ms-swift 4.6, for a LoRA run of PPO
    "rlhf_type": "ppo",
    "model": "base",
    "model_meta": SimpleNamespace(is_multimodal=False),
    "reward_model": ["runs/sft"],
    "reward_adapters": [],
    "ref_model": None,
    "ref_adapters": [],
    "tuner_type": "lora",
    "tuner_backend": "peft",
    "task_type": "causal_lm",
    "adapters": [],
    "use_swift_lora": False,
    "use_dora": False,
    "init_weights": True,
    "modules_to_save": [],
    "target_parameters": None,
    "lora_bias": "none",
    "lorap_lr_ratio": None,
    "use_galore": False,
    "optimizer": None,
    "deepspeed": None,
    "fsdp": [],
    "sequence_parallel_size": 1,
    "use_ray": False,
    "use_liger_kernel": False,
    "use_flash_ckpt": False,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
}

REFUSED = {
    "tuner_type": ["full", "adalora", "longlora"],
    "tuner_backend": ["unsloth"],
    "task_type": ["seq_cls", "embedding"],
    "reward_model": [[], ["runs/sft", "other"], None],
    "reward_adapters": [["adapter"]],
    "ref_model": ["other"],
    "ref_adapters": [["adapter"]],
    "adapters": [["adapter"]],
    "use_swift_lora": [True],
    "use_dora": [True],
    "init_weights": ["pissa", "pissa_niter_16", "olora", "loftq", "lora-ga", "gaussian"],
    "modules_to_save": [["lm_head"]],
    "target_parameters": [["experts.gate"]],
    "lora_bias": ["all"],
    "lorap_lr_ratio": [16.0],
    "use_galore": [True],
    "optimizer": ["lorap", "galore", "muon"],
    "deepspeed": [{"zero_optimization": {"stage": 3}}],
    "fsdp": ["full_shard auto_wrap"],
    "sequence_parallel_size": [2],
    "use_ray": [True],
    "use_liger_kernel": [True],
    "use_flash_ckpt": [True],
    "resume_from_checkpoint": ["output/checkpoint-4"],
    "load_best_model_at_end": [True],
}


def arguments(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**DEFAULTS | changes)


def test_a_plain_run_is_not_refused():
    swift.refuse(arguments())


def test_every_refusal_has_a_case():
    assert {refusal.setting for refusal in swift.REFUSALS} == REFUSED.keys() - {"reward_model"}


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refused(setting, value):
    with pytest.raises(HostError) as error:
        swift.refuse(arguments(**{setting: value}))
    assert str(error.value).startswith(f"{setting}={value!r}, ")
    assert "; " in str(error.value)  # and what to do


def test_multimodal_models_are_refused():
    with pytest.raises(HostError, match=r"model='base' is multimodal"):
        swift.refuse(arguments(model_meta=SimpleNamespace(is_multimodal=True)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift")
    base = write_model(folder / "base")
    model = HydraModel.from_pretrained(base, train="sft", device="cpu")
    model.save_pretrained(folder / "untrained")
    model.reward_head_trained = True
    model.save_pretrained(folder / "tuned")
    return folder


def test_only_ppo_with_a_saved_model_is_patched(saved):
    tuned = str(saved / "tuned")
    assert swift.hydra_folder(arguments(reward_model=[tuned])) == saved / "tuned"
    assert swift.hydra_folder(arguments(reward_model=["classifier", tuned])) == saved / "tuned"  # which is refused then
    assert swift.hydra_folder(arguments(reward_model=[str(saved / "base")])) is None
    assert swift.hydra_folder(arguments(reward_model=None)) is None
    assert swift.hydra_folder(arguments(reward_model=[tuned], rlhf_type="grpo")) is None


def test_the_base_must_be_that_of_the_saved_model(saved, monkeypatch):
    swift.check_saved(saved / "tuned", arguments(model=str(saved / "base")))
    swift.check_saved(saved / "tuned", arguments(model="hub/name", model_dir=str(saved / "base")))
    monkeypatch.chdir(saved)
    swift.check_saved(Path("tuned"), arguments(model="base"))
    with pytest.raises(HostError, match=r"model='other' is not 'base', which 'tuned/hydra.json' names"):
        swift.check_saved(Path("tuned"), arguments(model="other"))


def test_a_reward_head_must_have_been_trained(saved):
    with pytest.raises(HostError, match=r"run hydra-ppo sft first"):
        swift.check_saved(saved / "untrained", arguments(model=str(saved / "base")))


def test_the_module_prints_the_path_of_the_plugin_and_nothing_else():
    command = [sys.executable, "-m", "hydra_ppo.patches.swift"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{swift.PLUGIN}\n"
    assert swift.PLUGIN.is_file()


def test_the_folder_of_the_plugin_hides_no_package():
    """Ms-swift puts it on sys.path."""
    assert all(path.stem.startswith(("hydra_", "__")) for path in swift.PLUGIN.parent.iterdir())
