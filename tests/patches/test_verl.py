"""verl's engine without verl: what is refused, how rows come and go, what an import says where verl is absent or another."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches.verl_rows import Rows, by_temperature, refuse_batch, temperatures_of
from hydra_ppo.patches.verl_rules import Extra, check_shared, read, refuse
from hydra_ppo.patches.versions import HostError
from tests import house

MODEL = {  # as verl 0.9.1 has them, for a run with LoRA
    "path": "base",
    "local_path": "base",
    "hf_config_path": "base",
    "trust_remote_code": False,
    "override_config": {},
    "enable_gradient_checkpointing": True,
    "enable_activation_offload": False,
    "use_remove_padding": True,
    "lora_rank": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "target_parameters": None,
    "exclude_modules": None,
    "lora": {"merge": False, "rank": 0, "adapter_path": None},
    "lora_adapter_path": None,
    "use_liger": False,
    "use_fused_kernels": False,
    "tiled_mlp": {"enabled": False, "num_shards": 4},
    "mtp": SimpleNamespace(enable=False),
}
ENGINE = {
    "param_offload": False,
    "optimizer_offload": False,
    "offload_policy": False,
    "fsdp_size": -1,
    "ulysses_sequence_parallel_size": 1,
    "mixed_precision": None,
    "pad_to_length": False,
    "qat": SimpleNamespace(enable=False),
    "router_replay": SimpleNamespace(mode="disabled"),
}
CHECKPOINT = {"save_contents": ["model", "optimizer", "extra"], "load_contents": ["model"], "async_save": False}

REFUSED = {
    "model": {
        "lora_rank": 0,
        "hf_config_path": "other",
        "override_config": {"rope_theta": 1.0},
        "exclude_modules": "q_proj",
        "lora": {"merge": True},
        "use_liger": True,
        "use_fused_kernels": True,
        "tiled_mlp": {"enabled": True},
        "mtp": SimpleNamespace(enable=True),
    },
    "engine": {
        "param_offload": True,
        "offload_policy": True,
        "fsdp_size": 2,
        "ulysses_sequence_parallel_size": 4,
        "pad_to_length": True,
        "qat": SimpleNamespace(enable=True),
        "router_replay": SimpleNamespace(mode="R2"),
    },
    "checkpoint": {"save_contents": ["model", "hf_model"], "load_contents": ["hf_model"], "async_save": True},
}


def groups(**changes):
    found = {"model": MODEL, "engine": ENGINE, "checkpoint": CHECKPOINT}
    return {name: SimpleNamespace(**(values | changes.get(name, {}))) for name, values in found.items()}


@pytest.mark.parametrize("role", ["actor", "reference", "critic"])
def test_defaults_are_taken(role):
    refuse(role, **groups())


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [(group, setting, value) for group, values in REFUSED.items() for setting, value in values.items()],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_setting_is_refused_by_name(group, setting, value):
    with pytest.raises(HostError) as error:
        refuse("actor", **groups(**{group: {setting: value}}))
    text = str(error.value)
    assert setting in text
    assert text.startswith("actor_rollout_ref.")
    assert "\n" not in text
    assert ";" in text  # what to do


def test_a_critic_takes_the_rank_of_the_actor_and_names_its_own_settings():
    refuse("critic", **groups(model={"lora_rank": 0}))
    with pytest.raises(HostError, match=r"^critic\.fsdp\.param_offload=True"):
        refuse("critic", **groups(engine={"param_offload": True}))
    with pytest.raises(HostError, match=r"^critic\.model\.lora_adapter_path='sft'"):
        refuse("critic", **groups(model={"lora_adapter_path": "sft"}))


def settings(role="actor", **changes):
    found = groups(**changes)
    return read(role, found["model"], found["engine"])


def test_what_the_settings_say_of_the_base():
    plain = settings()
    assert (plain.path, plain.rank, plain.alpha, plain.dtype, plain.attention) == ("base", 16, 32, "bf16", "auto")
    assert (plain.packing, plain.checkpointing, plain.checkpoint_offload) == (True, True, False)
    changed = settings(
        model={
            "use_remove_padding": False,
            "enable_activation_offload": True,
            "override_config": {"attn_implementation": "sdpa"},
            "lora": {"hydra": {"quantization": "nf4", "tile_tokens": 64}},
        },
        engine={"mixed_precision": {"param_dtype": "float16"}},
    )
    assert (changed.packing, changed.checkpoint_offload, changed.attention, changed.dtype) == (False, True, "sdpa", "fp16")
    assert changed.extra == Extra(quantization="nf4", tile_tokens=64)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"engine": {"mixed_precision": {"param_dtype": "fp8"}}}, "mixed_precision.param_dtype='fp8'"),
        ({"model": {"override_config": {"attn_implementation": "flex"}}}, "attn_implementation='flex'"),
        (
            {"model": {"enable_activation_offload": True, "enable_gradient_checkpointing": False}},
            "enable_activation_offload=True moves what gradient checkpointing keeps",
        ),
        ({"model": {"lora": {"hydra": {"bits": 4}}}}, "lora.hydra.bits is not a setting; choose among quantization"),
        ({"model": {"lora": {"hydra": {"quantization": "gptq"}}}}, "lora.hydra.quantization='gptq' is unknown; choose int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_nothing_can_be_made_of(changes, line):
    with pytest.raises(HostError) as error:
        settings(**changes)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [
        ("model", "local_path", "other"),
        ("model", "lora_rank", 8),
        ("model", "lora_alpha", 8),
        ("model", "target_modules", ["q_proj"]),
        ("model", "enable_gradient_checkpointing", False),
        ("model", "use_remove_padding", False),
        ("model", "lora", {"hydra": {"quantization": "nf4"}}),
        ("engine", "mixed_precision", {"param_dtype": "fp32"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_critic_that_asks_for_another_base_is_refused(group, setting, value):
    check_shared("critic", settings("critic", model={"lora_rank": 0, "lora_alpha": 1}), settings())
    with pytest.raises(HostError, match="which actor_rollout_ref") as error:
        check_shared("critic", settings("critic", **{group: {setting: value}}), settings())
    assert setting.removeprefix("local_") in str(error.value)


# -- rows ------------------------------------------------------------------------------------------------------------------


def jagged(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_rows_come_in_and_numbers_go_back_where_verl_looks():
    data = {"input_ids": jagged([5, 6, 7, 8], [9, 4], [3, 2, 1, 7, 6])}
    data |= {"prompts": jagged([5, 6], [9], [3, 2, 1, 7]), "responses": jagged([7, 8], [4], [6])}
    rows = Rows(data)
    found = rows.sequences
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 0], [9, 4, 0, 0, 0], [3, 2, 1, 7, 6]]
    assert found.prompt_lengths.tolist() == [2, 1, 4]
    assert found.response_ids[found.response_mask].tolist() == [7, 8, 4, 6]
    assert found.lengths == (4, 2, 5)
    numbers = torch.tensor([[1.0, 2.0], [3.0, -9.0], [4.0, -9.0]], requires_grad=True)
    back = rows.back(numbers)
    assert [row.tolist() for row in back.unbind()] == [[0, 1, 2, 0], [3, 0], [0, 0, 0, 4, 0]]
    (back.values() * torch.arange(1.0, 12.0)).sum().backward()  # by hand: places 2, 3, 5 and 10 of the eleven
    assert numbers.grad.tolist() == [[2, 3], [5, 0], [10, 0]]
    # The same rows padded, as the older trainer of verl has them.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]])
    padded = data | {"prompts": torch.zeros(3, 4), "responses": torch.zeros(3, 2), "attention_mask": mask}
    again = Rows(padded).sequences
    assert torch.equal(again.response_ids, found.response_ids)
    assert torch.equal(again.response_mask, found.response_mask)
    assert again.lengths == found.lengths
    # And rows of which nobody says where the prompt ends.
    whole = Rows({"input_ids": data["input_ids"]})
    assert whole.sequences.prompt_lengths.tolist() == [1, 1, 1]
    assert whole.sequences.response_mask.sum(dim=1).tolist() == [3, 1, 4]
    with pytest.raises(HostError, match="not prompts followed by responses"):
        Rows(data | {"prompts": jagged([5], [9], [3])})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"calculate_sum_pi_squared": True}, "calculate_sum_pi_squared=True"),
        ({"distillation_use_topk": True}, "distillation_use_topk=True"),
        ({"enable_routing_replay": True}, "enable_routing_replay=True"),
        ({"multi_modal_inputs": [{}, {"pixel_values": 1}]}, "multi_modal_inputs"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids is padded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_is_refused(changes, line):
    fine = {"input_ids": jagged([1, 2], [3]), "calculate_sum_pi_squared": False, "multi_modal_inputs": [{}, {}]}
    refuse_batch(fine)
    with pytest.raises(HostError, match=line):
        refuse_batch(fine | changes)


def test_rows_of_several_temperatures():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = HydraModel.from_config(LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape))
    rows = Rows({"input_ids": jagged([5, 6, 7, 8], [9, 4], [3, 2, 1, 7, 6], [1, 2, 3])}).sequences
    temperatures = temperatures_of({"temperature": torch.tensor([0.5, 1.0, 0.5, 2.0])}, 4)
    assert temperatures == [0.5, 1.0, 0.5, 2.0]
    with model.role("actor"):
        values, entropy = by_temperature(model.logprobs, rows, temperatures)
        for row, temperature in enumerate(temperatures):
            alone = model.logprobs(rows, temperature)
            mask = rows.response_mask[row]
            torch.testing.assert_close(values[row][mask], alone.logprobs[row][mask])
            torch.testing.assert_close(entropy[row][mask], alone.entropy[row][mask])
    for bad in (0.0, -1.0, float("nan"), torch.tensor([1.0, 1.0])):
        with pytest.raises(HostError, match="temperature="):
            temperatures_of({"temperature": bad}, 4)


# -- the host --------------------------------------------------------------------------------------------------------------


def python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    lines = [f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}", code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=200)


def test_without_verl_an_import_says_so_in_a_line():
    done = python("try:\n import hydra_ppo.patches.verl\nexcept Exception as e: print(type(e).__name__, e)")
    assert done.stdout.startswith("HostError verl is not installed; supported is >=0.9.1,<0.9.2: pip install"), done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_the_package_names_the_module_to_verl():
    found = configparser.ConfigParser()
    found.read(house.ROOT / "setup.cfg")
    assert found["options.entry_points"]["verl.plugins"].split() == ["hydra_ppo", "=", "hydra_ppo.patches.verl"]
    assert "patches.verl" in house.modules()


def test_another_version_is_refused_when_the_engine_is_asked_for(tmp_path):
    """verl passes over plugins that raise, so the line must come with the engine. All else of verl goes on."""
    for name, text in {
        "verl/__init__.py": "import hydra_ppo.patches.verl\n",
        "verl/workers/__init__.py": "",
        "verl/workers/engine/__init__.py": "from verl.workers.engine.base import EngineRegistry\n",
        "verl/workers/engine/base.py": """
class BaseEngine: pass
class EngineRegistry:
    _engines = {}
    @classmethod
    def register(cls, model_type, backend, device):
        def keep(engine):
            cls._engines.setdefault(model_type, {})[backend] = engine
            return engine
        return keep
""",
        "verl-0.8.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = """
import verl
assert "verl.workers.engine" not in sys.modules
from verl.workers.engine import EngineRegistry
for kind in ("language_model", "value_model"):
    try: EngineRegistry._engines[kind]["hydra"](model_config=None)
    except Exception as error: print(type(error).__name__, error)
"""
    done = python(code, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("HostError verl==0.8.0 is installed, but this patch supports >=0.9.1,<0.9.2" in line for line in lines)
