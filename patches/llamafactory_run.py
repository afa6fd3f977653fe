"""One run of LLaMA-Factory's PPO on role views: what `hydra_ppo.patches.llamafactory` puts in place while it lasts.

LLaMA-Factory scores each mini-batch right after sampling it, and asks for the reference's log-probs of the same rows when
all are there. Here both come from the one pass with adapters off, see `known_rows`. Its trainer is a child of TRL's
step-style one, so the rest of the update is that of `trl_step`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches import trl_step
from hydra_ppo.patches.binding import Bindings
from hydra_ppo.patches.known_rows import KnownRows
from hydra_ppo.patches.llamafactory_rules import RULES, WORKFLOW, check_text_only, say
from hydra_ppo.patches.scored_logits import logprobs_from_logits
from hydra_ppo.patches.step_passes import batched_forward_pass
from hydra_ppo.patches.value_head import ActorCritic, FrozenReference, StepModel, TokenScores, actor_critic, frozen_reference
from hydra_ppo.views.views import role_views

DTYPES = {None: "auto", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ATTENTION = {"auto": "auto", "sdpa": "sdpa", "fa2": "flash_attention_2"}


# LLaMA-Factory runs models in `torch.autocast(device)` whatever their type: in fp16 on a GPU, be the base bf16 or fp32, and
# with the scalar heads, which are fp32, in it. Views compute in the type that the base was loaded in.
AUTOCAST = False


class Run:
    """The models of one run, in place of those that LLaMA-Factory would load, while its block lasts.

    Args:
        folder: saved HydraModel.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: KnownRows | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(trl_step.install_trainer())
            bindings = Bindings()
            stack.callback(bindings.undo)
            self._bind(bindings)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _bind(self, bindings: Bindings) -> None:
        """Replace what loads, saves and reads models."""
        workflow, trainer = import_module(WORKFLOW), import_module("llamafactory.train.ppo.trainer")
        host = trainer.CustomPPOTrainer
        bindings.set(workflow, "load_model", self.load_model)
        bindings.set(workflow, "create_ref_model", self.create_ref_model)
        bindings.set(workflow, "create_reward_model", self.create_reward_model)
        bindings.set(workflow, "MultiModalDataCollatorForSeq2Seq", _collator(workflow.MultiModalDataCollatorForSeq2Seq))
        bindings.set(trainer, "logprobs_from_logits", logprobs_from_logits(trainer.logprobs_from_logits))
        bindings.set(host, "batched_forward_pass", batched_forward_pass(host.batched_forward_pass))
        bindings.set(host, "save_model", _save_model(host.save_model))

    def load_model(
        self, tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, add_valuehead: bool = False
    ) -> ActorCritic:
        """Load the one base with the adapters and heads of the folder, and return the policy with its values."""
        for rule in RULES:  # the tokenizer that was loaded meanwhile may have set `resize_vocab`
            if rule.arguments == "model":
                rule.check(model_args)
        check_text_only(import_module("llamafactory.model").load_config(model_args))
        bit = model_args.quantization_bit
        model = HydraModel.from_pretrained(
            self.folder,
            quantization={None: None, 4: model_args.quantization_type, 8: "int8"}[bit],
            lora=lora_settings(finetuning_args),
            attention=ATTENTION[str(getattr(model_args.flash_attn, "value", model_args.flash_attn))],
            dtype=DTYPES[model_args.compute_dtype],
            device=str(import_module("llamafactory.extras.misc").get_current_device()),
            trust_remote_code=model_args.trust_remote_code,
        )
        model.enable_checkpointing(not model_args.disable_gradient_checkpointing)
        shape = model.base.peft_config["actor"]
        trained = sum(p.numel() for role in model.trainable_roles for p in model.role_parameters(role).values())
        say(
            f"hydra-ppo: actor, reference, critic and reward model share one base, from {self.folder}; trainable params: "
            f"{trained:,}, LoRA r={shape.r}, alpha={shape.lora_alpha} as in that folder, whatever lora_rank, lora_alpha and "
            f"lora_target say; gradient checkpointing {'on' if model.checkpointing else 'off'}, never reentrant."
        )
        self.known = KnownRows(role_views(model).reference.passes)
        self.known.start()
        self._stack.callback(self.known.stop)
        return actor_critic(self.known, _parent(), AUTOCAST)

    def create_ref_model(self, model_args: Any, finetuning_args: Any, add_valuehead: bool = False) -> FrozenReference:
        """Return the reference of the model that `load_model` loaded."""
        assert self.known is not None
        return frozen_reference(self.known, _parent(), AUTOCAST)

    def create_reward_model(self, model: ActorCritic, model_args: Any, finetuning_args: Any) -> TokenScores:
        """Return the reward model of `model`, the policy."""
        return TokenScores(model.passes, AUTOCAST)


def _parent() -> Any:
    return import_module("trl").AutoModelForCausalLMWithValueHead


def lora_settings(finetuning_args: Any) -> LoraSettings:
    """Return the shape of new adapters, which only a folder without any (a tuned base) gets."""
    targets = list(finetuning_args.lora_target)
    return LoraSettings(
        r=finetuning_args.lora_rank,
        alpha=finetuning_args.lora_alpha,
        target_modules="all-linear" if targets == ["all"] else targets,
        use_rslora=finetuning_args.use_rslora,
    )


# -- what is bound -------------------------------------------------------------------------------------------------------


def _collator(original: Any) -> Any:
    def collator(**options: Any) -> Any:
        # It asks the model about images only; and huggingface_hub copies what the trainer is made of, this model with it.
        return original(**options | {"model": None})

    return collator


def _save_model(original: Any) -> Any:
    def save_model(self: Any, output_dir: str | None = None) -> None:
        view = self.accelerator.unwrap_model(self.model)
        if not isinstance(view, StepModel):
            original(self, output_dir)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            view.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    return save_model
