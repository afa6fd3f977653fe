"""What `hydra_ppo.patches.llamafactory` refuses, without LLaMA-Factory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from hydra_ppo.model.manifest import MANIFEST
from hydra_ppo.patches import llamafactory, llamafactory_rules
from hydra_ppo.patches.versions import HostError
from tests.hosts.common import save_tuned, tiny_config

SITE = Path(llamafactory.__file__).parent / "site"

REFUSED = {
    "reward_model_type": "lora",
    "finetuning_type": "full",
    "ref_model": "other",
    "ref_model_adapters": "other",
    "ref_model_quantization_bit": 4,
    "reward_model_adapters": ["other"],
    "reward_model_quantization_bit": 8,
    "adapter_name_or_path": ["other"],
    "use_dora": True,
    "lora_dropout": 0.1,
    "pure_bf16": True,
    "create_new_adapter": True,
    "additional_target": ["embed_tokens"],
    "use_llama_pro": True,
    "use_galore": True,
    "use_apollo": True,
    "use_badam": True,
    "use_adam_mini": True,
    "use_muon": True,
    "loraplus_lr_ratio": 16.0,
    "resize_vocab": True,
    "train_from_scratch": True,
    "mixture_of_depths": "load",
    "rope_scaling": "linear",
    "shift_attn": True,
    "upcast_layernorm": True,
    "upcast_lmhead_output": True,
    "moe_aux_loss_coef": 0.1,
    "use_unsloth": True,
    "enable_liger_kernel": True,
    "use_unsloth_gc": True,
    "flash_attn": "disabled",
    "quantization_bit": 2,
    "quantization_method": "hqq",
    "double_quantization": False,
    "quantization_device_map": "auto",
    "model_revision": "v2",
    "cache_dir": "elsewhere",
    "hf_hub_token": "secret",
    "world_size": 2,
    "deepspeed": "ds_z3_config.json",
    "fsdp": "full_shard",
    "resume_from_checkpoint": "out/checkpoint-2",
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamafactory")
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "base")
    return save_tuned(folder / "sft", folder / "base")


def arguments(tuned: Path, **changes: Any) -> dict[str, SimpleNamespace]:
    groups = {name: SimpleNamespace() for name in ("model", "data", "training", "finetuning", "generating")}
    groups["model"].model_name_or_path = str(tuned.parent / "base")
    for rule in llamafactory_rules.RULES:
        setattr(groups[rule.arguments], rule.setting, changes.get(rule.setting, rule.allowed[0]))
    return groups


def test_defaults_pass(tuned: Path) -> None:
    llamafactory_rules.check(tuned, **arguments(tuned))


def test_every_rule_has_a_case() -> None:
    assert sorted(REFUSED) == sorted(rule.setting for rule in llamafactory_rules.RULES)


@pytest.mark.parametrize("setting", REFUSED)
def test_refuses(tuned: Path, setting: str) -> None:
    with pytest.raises(HostError, match=f"^{setting}=.*; .*\\.$"):
        llamafactory_rules.check(tuned, **arguments(tuned, **{setting: REFUSED[setting]}))


def test_refuses_another_base(tuned: Path) -> None:
    wrong = arguments(tuned)
    wrong["model"].model_name_or_path = "meta-llama/Llama-3.2-1B"
    with pytest.raises(HostError, match=r"^model_name_or_path='meta-llama/Llama-3.2-1B' is not '.*base', the base of"):
        llamafactory_rules.check(tuned, **wrong)


def test_refuses_an_untrained_reward_head(tuned: Path, tmp_path: Path) -> None:
    manifest = json.loads((tuned / MANIFEST).read_text()) | {"reward_head_trained": False}
    manifest["base"] = {"name_or_path": str(tuned.parent / "base"), "relative": False}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(HostError, match="has no trained reward head"):
        llamafactory_rules.check(tmp_path, **arguments(tuned))


def test_refuses_images() -> None:
    with pytest.raises(HostError, match="vision_config"):
        llamafactory_rules.check_text_only(SimpleNamespace(name_or_path="llava", vision_config={}))


def test_other_reward_models_are_left_alone(tmp_path: Path) -> None:
    assert llamafactory.hydra_folder(tmp_path) is None
    assert llamafactory.hydra_folder("http://localhost:8000/score") is None


# -- sitecustomize -------------------------------------------------------------------------------------------------------


def python(*arguments: str, path: list[Path]) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True).stdout


def test_prints_the_folder_and_nothing_else() -> None:
    assert python("-m", "hydra_ppo.patches.llamafactory", path=[]) == f"{SITE}\n"


def test_an_unrelated_process_imports_nothing_more() -> None:
    assert python("-c", "import sys; print('torch' in sys.modules, 'hydra_ppo' in sys.modules)", path=[SITE]) == "False False\n"


def test_the_hidden_sitecustomize_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("seen = __file__\n")
    shown = python("-c", "import sitecustomize; print(sitecustomize.seen)", path=[SITE, tmp_path])
    assert shown == f"{tmp_path / 'sitecustomize.py'}\n"


def test_binds_after_the_workflow_has_run(tmp_path: Path) -> None:
    workflow = tmp_path / "llamafactory" / "train" / "ppo"
    workflow.mkdir(parents=True)
    for folder in (workflow, *list(workflow.parents)[:2]):
        (folder / "__init__.py").write_text("")
    (workflow / "workflow.py").write_text("def run_ppo(): pass\n")
    code = (
        "import hydra_ppo.patches.llamafactory as patch, importlib\n"
        "patch.bind = lambda module: print(module.__name__, module.run_ppo.__name__)\n"
        "importlib.import_module('llamafactory.train.ppo.workflow')\n"
    )
    assert python("-c", code, path=[SITE, tmp_path]) == "llamafactory.train.ppo.workflow run_ppo\n"
