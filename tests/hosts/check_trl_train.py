"""TRL's PPOTrainer with `train()`, 0.12 to 1.12: log-probs, values and scores as TRL computes them, then its own training."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches import trl, trl_train
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.views import role_views
from tests.hosts import common
from tests.hosts.common import EOS, PAD, Result

UPDATES, ROWS, RESPONSE, TEMPERATURE = 6, 16, 24, 0.7
TRAINER = trl_train.trainer_module()


class ValueLosses(TrainerCallback):
    """Keeps the value loss of each update."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss/value_avg" in logs:
            self.losses.append(float(logs["loss/value_avg"]))


def trainer(folder: Path, losses: list[float], arguments: dict[str, Any], processing_class: Any = None, **changes: Any) -> Any:
    """Build the host's trainer as a script would; what differs between versions is asked of them."""
    config_class = sys.modules[TRAINER.__name__.replace("ppo_trainer", "ppo_config")].PPOConfig
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": ROWS // 4,
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "local_rollout_forward_batch_size": 8,
        "response_length": RESPONSE,
        "total_episodes": ROWS * UPDATES,
        "temperature": TEMPERATURE,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "cliprange_value": 10.0,
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "seed": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | changes
    known = inspect.signature(TRAINER.PPOTrainer.__init__).parameters
    config = "args" if "args" in known else "config"
    # On the last batch of its dataloader TRL takes an optimizer step per micro-batch: one batch more than is used.
    rows = [{"input_ids": ids} for ids in common.prompts(ROWS) * (UPDATES + 1)]
    # A real tokenizer would bring nothing to most checks: TRL asks for these two tokens, and 0.12 lets it collate.
    tokens = SimpleNamespace(
        eos_token_id=EOS, pad_token_id=PAD, save_pretrained=lambda folder: None, pad=lambda rows, **_: collate(rows)
    )
    return TRAINER.PPOTrainer(
        **{config: config_class(**settings)},
        processing_class=processing_class or tokens,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[ValueLosses(losses)],
        **arguments,
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put prompts of one length together."""
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def numbers(models: dict[str, Any], sequences: Tensor, context: int) -> dict[str, Tensor]:
    """Compute what TRL's train() computes from one rollout, with TRL's own functions."""
    responses = sequences[:, context:]
    found = {}
    for name, role in (("logprobs", "actor"), ("ref_logprobs", "reference")):
        logits = TRAINER.forward(models[role], sequences, PAD).logits[:, context - 1 : -1]
        logits /= TEMPERATURE + 1e-7
        if hasattr(TRAINER, "selective_log_softmax"):
            found[name] = TRAINER.selective_log_softmax(logits, responses)
        else:
            found[name] = torch.gather(torch.nn.functional.log_softmax(logits, -1), 2, responses.unsqueeze(-1)).squeeze(-1)
        assert isinstance(logits, LazyLogits) == (role in models and hasattr(models[role], "hydra"))
        probabilities = torch.nn.functional.softmax(logits, dim=-1)
        found[f"{name}_entropy"] = torch.logsumexp(logits, dim=-1) - torch.sum(probabilities * logits, dim=-1)
    full, _, _ = TRAINER.get_reward(models["critic"], sequences, PAD, context)
    found["values"] = full[:, context - 1 : -1].squeeze(-1)
    _, found["scores"], _ = TRAINER.get_reward(models["reward"], sequences, PAD, context)
    return found


@torch.no_grad()
def compare(result: Result, model: HydraModel) -> None:
    """Note how far TRL's numbers on views are from those on separate models, for rows with padding on both sides."""
    ids = torch.tensor(common.prompts(6, 16 + RESPONSE, seed=9))
    for row, (left, right) in enumerate([(0, 0), (3, 0), (0, 5), (4, 7), (1, 1), (0, RESPONSE - 1)]):
        ids[row, :left] = PAD
        ids[row, ids.shape[1] - right :] = PAD
    views = dict(role_views(model))
    ours, theirs = numbers(views, ids, 16), numbers(common.separate_models(model), ids, 16)
    if role_views(model).actor.passes.reused != 1:
        result.problems.append("the reward did not use the reference's pass")
    real = ids[:, 16:] != PAD
    for name, expected in theirs.items():
        result.differences[name] = common.difference(ours[name], expected, None if name == "scores" else real)


def patched(result: Result, folder: Path) -> None:
    """Train on views."""
    model = common.hydra_model()
    with common.watch_undo(result, [TRAINER, TRAINER.PPOTrainer]), trl.apply(model) as arguments:
        compare(result, model)
        host = trainer(folder, result.losses, arguments)
        with common.watch_training(result, model):
            host.train()
        host.save_model(str(folder / "saved"))
    again = HydraModel(common.separate_model(model, "reference"), saved=folder / "saved")
    for role in ("actor", "critic"):
        saved, trained = again.role_parameters(role), model.role_parameters(role)
        if not all(torch.equal(saved[name], trained[name]) for name in trained):
            result.problems.append(f"the saved {role} is not the trained one")


def unpatched(result: Result, folder: Path) -> None:
    """Train on separate models with LoRA on policy and value, as far as the version can."""
    models = common.separate_models(common.hydra_model())
    known = inspect.signature(TRAINER.PPOTrainer.__init__).parameters
    policy = get_peft_model(models["actor"], lora(TaskType.CAUSAL_LM))
    value = get_peft_model(models["critic"], lora(TaskType.SEQ_CLS))
    arguments = {"reward_model": models["reward"], "value_model": value}
    arguments |= {"model" if "model" in known else "policy": policy}
    # 0.12 knows no reference that is the policy with its adapter off.
    shared = "peft_config" in known
    arguments |= {"ref_model" if "ref_model" in known else "ref_policy": None if shared else models["reference"]}
    listed = [policy, value, models["reward"], *([] if shared else [models["reference"]])]
    host = trainer(folder, result.losses, arguments)
    with common.watch(result, listed):
        host.train()


def lora(task: TaskType) -> LoraConfig:
    """Return LoRA of the shape that HydraModel takes by default."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


if __name__ == "__main__":
    common.main("TRL", ("trl",), patched, unpatched)
