"""LLaMA-Factory as its patch meets it: the module that runs PPO, its log, and the settings that go with one shared base.

Nothing of LLaMA-Factory, and no torch, is imported with this module: `hydra_ppo.patches.llamafactory` and the run that it puts
in place both stand on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra_ppo.model.manifest import base_folder, read_manifest
from hydra_ppo.patches.versions import HostError

WORKFLOW = "llamafactory.train.ppo.workflow"
"""The module whose `run_ppo` is replaced."""


def say(line: str) -> None:
    """Log one line where LLaMA-Factory logs its own."""
    import_module("llamafactory.extras.logging").get_logger("llamafactory.hydra_ppo").info_rank0(line)


@dataclass(frozen=True)
class Rule:
    """A setting that works with some values only; the first is LLaMA-Factory's default, or as good."""

    arguments: str
    setting: str
    allowed: tuple[Any, ...]
    why: str
    remedy: str

    def check(self, arguments: Any) -> None:
        """Raise HostError where the group of arguments that has this setting has another value; an absent one is allowed."""
        value = getattr(arguments, self.setting, self.allowed[0])
        value = getattr(value, "value", value)  # of an enumeration
        if value not in self.allowed:
            shown = "..." if self.setting.endswith("token") else repr(value)  # a secret
            raise HostError(f"{self.setting}={shown} {self.why}; {self.remedy}.")


OFF = (None, False, "", [], {})

BESIDE = "names a model beside the one base that is all four roles"
SHARED = "trains what all roles share"
CHANGED = "changes the base, which must stay as hydra-ppo trained on it"
REPLACED = "replaces layers of the shared base"
OPTIMIZER = "is an optimizer that role views are not tested with"
UNHEARD = "is not passed on to the shared base"
SHARDED = "shards a base that is shared"

RULES = (
    Rule("finetuning", "reward_model_type", ("full",), "is not for a folder of hydra-ppo", "use reward_model_type: full"),
    Rule("finetuning", "finetuning_type", ("lora",), SHARED, "use finetuning_type: lora"),
    Rule("finetuning", "ref_model", OFF, BESIDE, "leave it out, the reference is a role of the reward_model folder"),
    Rule("finetuning", "ref_model_adapters", OFF, BESIDE, "leave it out, as ref_model"),
    Rule("finetuning", "ref_model_quantization_bit", OFF, BESIDE, "leave it out, quantization_bit is for all roles"),
    Rule("finetuning", "reward_model_adapters", OFF, BESIDE, "leave it out, the reward_model folder has all adapters"),
    Rule("finetuning", "reward_model_quantization_bit", OFF, BESIDE, "leave it out, quantization_bit is for all roles"),
    Rule("model", "adapter_name_or_path", OFF, BESIDE, "leave it out, to go on from a saved run name that as reward_model"),
    Rule("finetuning", "use_dora", OFF, "is a kind of LoRA that role views do not have", "leave it out"),
    Rule("finetuning", "lora_dropout", (0.0,), "makes the roles differ from pass to pass", "use 0.0"),
    Rule("finetuning", "pure_bf16", OFF, "rounds the adapters, which are fp32 here", "use bf16: true"),
    Rule("finetuning", "create_new_adapter", OFF, CHANGED, "leave it out"),
    Rule("finetuning", "additional_target", OFF, SHARED, "leave it out"),
    Rule("finetuning", "use_llama_pro", OFF, SHARED, "leave it out"),
    Rule("finetuning", "use_galore", OFF, OPTIMIZER, "leave it out"),
    Rule("finetuning", "use_apollo", OFF, OPTIMIZER, "leave it out"),
    Rule("finetuning", "use_badam", OFF, OPTIMIZER, "leave it out"),
    Rule("finetuning", "use_adam_mini", OFF, OPTIMIZER, "leave it out"),
    Rule("finetuning", "use_muon", OFF, OPTIMIZER, "leave it out"),
    Rule("finetuning", "loraplus_lr_ratio", OFF, OPTIMIZER, "leave it out"),
    Rule("model", "resize_vocab", OFF, CHANGED, "leave it out, and add_tokens with it"),
    Rule("model", "train_from_scratch", OFF, CHANGED, "leave it out"),
    Rule("model", "mixture_of_depths", OFF, CHANGED, "leave it out"),
    Rule("model", "rope_scaling", OFF, CHANGED, "leave it out, or put it into the base's config.json before hydra-ppo sft"),
    Rule("model", "shift_attn", OFF, CHANGED, "leave it out"),
    Rule("model", "upcast_layernorm", OFF, "rounds the adapters, which are fp32 here, in each generation", "leave it out"),
    Rule("model", "upcast_lmhead_output", OFF, "is for logits, which are not computed here", "leave it out"),
    Rule("model", "moe_aux_loss_coef", OFF, UNHEARD, "leave it out"),
    Rule("model", "use_unsloth", OFF, REPLACED, "leave it out"),
    Rule("model", "enable_liger_kernel", OFF, REPLACED, "leave it out"),
    Rule("model", "use_unsloth_gc", OFF, "recomputes layers in whichever role is active by then", "leave it out"),
    Rule("model", "flash_attn", ("auto", "sdpa", "fa2"), "keeps T x T attention scores", "use auto, sdpa or fa2"),
    Rule("model", "quantization_bit", (None, 4, 8), "is not a width that the base can be held in", "use 4, 8 or none"),
    Rule("model", "quantization_method", ("bnb",), "is not how the base can be held", "use bnb"),
    Rule("model", "double_quantization", (True,), "is not how the base can be held", "use true"),
    Rule("model", "quantization_device_map", OFF, UNHEARD, "leave it out"),
    Rule("model", "model_revision", ("main",), UNHEARD, "download the revision, and name its folder in both stages"),
    Rule("model", "cache_dir", OFF, UNHEARD, "set HF_HOME in the environment"),
    Rule("model", "hf_hub_token", OFF, UNHEARD, "set HF_TOKEN in the environment"),
    Rule("training", "world_size", (1,), "is untested, with one base a process", "set CUDA_VISIBLE_DEVICES to one GPU"),
    Rule("training", "deepspeed", OFF, SHARDED, "leave it out"),
    Rule("training", "fsdp", OFF, SHARDED, "leave it out"),
    Rule("training", "resume_from_checkpoint", OFF, "is not in LLaMA-Factory's PPO", "name the checkpoint as reward_model"),
)


def check(folder: Path, **arguments: Any) -> None:
    """Check the settings of a run on the saved model in `folder`.

    Args:
        folder: holds hydra.json.
        arguments: model, data, training, finetuning and generating arguments.

    Raises:
        HostError: for the first that does not go together with a shared base.
    """
    for rule in RULES:
        rule.check(arguments[rule.arguments])
    named, base = arguments["model"].model_name_or_path, base_folder(folder)
    if named != base and not (Path(named).is_dir() and Path(base).is_dir() and Path(named).samefile(base)):
        raise HostError(
            f"model_name_or_path={named!r} is not {base!r}, the base of reward_model={str(folder)!r}; name that one."
        )
    if not read_manifest(folder)["reward_head_trained"]:
        raise HostError(f"reward_model={str(folder)!r} has no trained reward head; name a folder that hydra-ppo sft wrote.")


def check_text_only(config: Any) -> None:
    """Check that a model's config is of a language model alone.

    Raises:
        HostError: where it has parts for images or sound.
    """
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise HostError(
                f"model_name_or_path={getattr(config, 'name_or_path', None)!r} has a {part}, which no role reads; "
                "use a base for text only."
            )
