"""One run of LLaMA-Factory's PPO on role views: what `hydra_ppo.patches.llamafactory` puts in place while it lasts.

LLaMA-Factory scores each mini-batch right after sampling it, and asks for the reference's log-probs of the same rows when
all are there. Here both come from the one pass with adapters off: the reward view keeps the reference's log-probs of each
row (T numbers), the reference view hands them out, and the step ends by forgetting them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hydra_ppo.config import LoraSettings
from hydra_ppo.lazy_logits import SampledLogits
from hydra_ppo.logprobs import token_logprobs
from hydra_ppo.model import HydraModel
from hydra_ppo.patches import value_head
from hydra_ppo.patches.binding import Bindings
from hydra_ppo.patches.llamafactory import RULES, WORKFLOW, check_text_only, say
from hydra_ppo.patches.value_head import ActorCritic, FrozenReference, ValueHeadView, actor_critic, in_compute_type, subclass
from hydra_ppo.views import ClassifierView

DTYPES = {None: "auto", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ATTENTION = {"auto": "auto", "sdpa": "sdpa", "fa2": "flash_attention_2"}


class Run:
    """The models of one run, in place of those that LLaMA-Factory would load.

    Args:
        folder: saved HydraModel.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: HydraModel | None = None
        self.rows = Rows()

    def bind(self, bindings: Bindings) -> None:
        """Replace what loads, saves and reads models."""
        workflow, trainer = import_module(WORKFLOW), import_module("llamafactory.train.ppo.trainer")
        trl_trainer = import_module("trl.trainer.ppo_trainer")
        bindings.set(workflow, "load_model", self.load_model)
        bindings.set(workflow, "create_ref_model", self.create_ref_model)
        bindings.set(workflow, "create_reward_model", self.create_reward_model)
        bindings.set(workflow, "MultiModalDataCollatorForSeq2Seq", _collator(workflow.MultiModalDataCollatorForSeq2Seq))
        bindings.set(trainer, "logprobs_from_logits", value_head.logprobs_from_logits(trainer.logprobs_from_logits))
        bindings.set(trl_trainer, "entropy_from_logits", value_head.entropy_from_logits(trl_trainer.entropy_from_logits))
        bindings.set(trainer.CustomPPOTrainer, "save_model", _save_model(trainer.CustomPPOTrainer.save_model))
        bindings.set(trainer.CustomPPOTrainer, "step", _step(trainer.CustomPPOTrainer.step, self.rows))

    def load_model(
        self, tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, add_valuehead: bool = False
    ) -> ActorCritic:
        """Load the one base with the adapters and heads of the folder, and return the policy with its values."""
        for rule in RULES:  # the tokenizer that was loaded meanwhile may have set `resize_vocab`
            if rule.arguments == "model":
                rule.check(model_args)
        check_text_only(import_module("llamafactory.model").load_config(model_args))
        bit = model_args.quantization_bit
        self.model = model = HydraModel.from_pretrained(
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
        return actor_critic(model, import_module("trl").AutoModelForCausalLMWithValueHead)

    def create_ref_model(self, model_args: Any, finetuning_args: Any, add_valuehead: bool = False) -> FrozenReference:
        assert self.model is not None
        return subclass(RowReference, import_module("trl").AutoModelForCausalLMWithValueHead)(self.model, self.rows)

    def create_reward_model(self, model: ActorCritic, model_args: Any, finetuning_args: Any) -> RowReward:
        return RowReward(model.hydra, self.rows)


def lora_settings(finetuning_args: Any) -> LoraSettings:
    """Return the shape of new adapters, which only a folder without any (a tuned base) gets."""
    targets = list(finetuning_args.lora_target)
    return LoraSettings(
        r=finetuning_args.lora_rank,
        alpha=finetuning_args.lora_alpha,
        target_modules="all-linear" if targets == ["all"] else targets,
        use_rslora=finetuning_args.use_rslora,
    )


# -- one pass for reward and reference -----------------------------------------------------------------------------------


class Rows:
    """The reference's log-probs by row of tokens, from the reward's pass until the step is over.

    Memory: T numbers a row.
    """

    def __init__(self) -> None:
        self._logprobs: dict[tuple[int, ...], Tensor] = {}
        self.kept = 0
        self.used = 0

    def keep(self, input_ids: Tensor, mask: Tensor, logprobs: Tensor) -> None:
        """Keep log-probs (B, T - 1) of the tokens after the first of each row of `input_ids` (B, T)."""
        for ids, counts, row in zip(input_ids, mask.bool(), logprobs, strict=True):
            self._logprobs[tuple(ids[counts].tolist())] = row[counts[1:] & counts[:-1]].clone()
            self.kept += 1

    def find(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return (B, T) log-probs, each at the column before its token's, or None where a row is not known."""
        found = torch.zeros(input_ids.shape, device=input_ids.device)
        for ids, counts, row in zip(input_ids, mask.bool(), found, strict=True):
            known = self._logprobs.get(tuple(ids[counts].tolist()))
            if known is None:
                return None
            row[:-1][counts[1:] & counts[:-1]] = known.to(row.device)
        self.used += len(found)
        return found

    def forget(self) -> None:
        self._logprobs.clear()


class RowReward(nn.Module):
    """The reward model's score at every position; keeps what the reference would say about the same rows."""

    def __init__(self, model: HydraModel, rows: Rows) -> None:
        super().__init__()
        self.pretrained_model: ClassifierView = model.views().reward
        self.config = self.pretrained_model.config
        self._rows = rows

    @property
    def hydra(self) -> HydraModel:
        return self.pretrained_model.hydra

    @torch.no_grad()
    @in_compute_type
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> tuple[None, None, Tensor]:
        """Return None, None, and scores (B, T)."""
        view = self.pretrained_model
        hidden = view.backbone(input_ids, attention_mask, **others | {"return_dict": True}).last_hidden_state
        roles = self.hydra.roles
        if roles["reference"].adapter == roles["reward"].adapter:
            found = token_logprobs(hidden[:, :-1], input_ids[:, 1:], self.hydra.architecture.lm_head())
            self._rows.keep(input_ids, attention_mask, found.logprobs)
            view.passes.forget()
        return None, None, view.score(hidden)[..., 0]


class RowReference(FrozenReference):
    """The reference, without a pass where the reward's has been over the same rows."""

    def __init__(self, model: HydraModel, rows: Rows) -> None:
        super().__init__(model)
        self._rows = rows

    def forward(  # as the parent's: TRL reads the names
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **others: Any,
    ) -> tuple[Any, None, Tensor]:
        """Return logits (B, T, V) that know the tokens of `input_ids` only, None, and zeros (B, T)."""
        known = None
        if input_ids is not None and attention_mask is not None:
            known = self._rows.find(input_ids, attention_mask)
        if known is None:
            return super().forward(input_ids, past_key_values, attention_mask, return_past_key_values, **others)
        vocabulary = self.hydra.architecture.output_embeddings.weight.shape[0]
        return RowLogits(input_ids.roll(-1, dims=1), known, vocabulary), None, torch.zeros_like(known)


@dataclass(eq=False)
class RowLogits(SampledLogits):
    """Logits of which the log-probs of a row's own next tokens are known."""

    def __getitem__(self, index: Any) -> RowLogits:
        if isinstance(index, tuple) and len(index) == self.ndim and index[-1] == slice(None):
            index = index[:-1]
        return RowLogits(self.tokens[index], self.logprobs[index], self.vocabulary)


def _collator(original: Any) -> Any:
    def collator(**options: Any) -> Any:
        # It asks the model about images only; and huggingface_hub copies what the trainer is made of, this model with it.
        return original(**options | {"model": None})

    return collator


def _step(original: Any, rows: Rows) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            rows.forget()

    return step


def _save_model(original: Any) -> Any:
    def save_model(self: Any, output_dir: str | None = None) -> None:
        view = self.accelerator.unwrap_model(self.model)
        if not isinstance(view, ValueHeadView):
            original(self, output_dir)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            view.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    return save_model
