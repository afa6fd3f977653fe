"""The hand-written loop of examples/hosts/loop.py, on role views and on four separate models."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, TaskType, get_peft_model

from examples.hosts import loop
from hydra_ppo import role_views
from tests.hosts import common
from tests.hosts.common import Result

STEPS = 6


@torch.no_grad()
def compare(result: Result, views, separate) -> None:
    """Note how far the loop's numbers on views are from those on separate models."""
    ids = torch.tensor(common.prompts(5, loop.PROMPT + loop.RESPONSE))
    mask = torch.ones_like(ids)
    mask[1, -4:] = mask[2, -9:] = 0
    counts = mask[:, loop.PROMPT :]
    for name, role in (("logprobs", "actor"), ("ref_logprobs", "reference")):
        ours, theirs = loop.logprobs(views[role], ids, mask), loop.logprobs(separate[role], ids, mask)
        result.differences[name] = common.difference(ours, theirs, counts)
    ours, theirs = loop.values(views["critic"], ids, mask), loop.values(separate["critic"], ids, mask)
    result.differences["values"] = common.difference(ours, theirs, counts)
    ids = ids.masked_fill(mask == 0, common.PAD)
    ours, theirs = (models["reward"](ids, attention_mask=mask).logits for models in (views, separate))
    result.differences["scores"] = common.difference(ours, theirs)


def patched(result: Result, folder: Path) -> None:
    """Train on views."""
    model = common.hydra_model()
    views = role_views(model)
    compare(result, views, common.separate_models(model))
    torch.manual_seed(4)
    with common.watch_training(result, model):
        result.losses = loop.train(*views.values(), steps=STEPS)


def unpatched(result: Result, folder: Path) -> None:
    """Train on separate models, LoRA on actor and critic."""
    separate = common.separate_models(common.hydra_model())
    shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    actor = get_peft_model(separate["actor"], LoraConfig(**shape, task_type=TaskType.CAUSAL_LM))
    critic = separate["critic"]
    critic.model = get_peft_model(critic.model, LoraConfig(**shape))
    torch.manual_seed(4)
    with common.watch(result, [actor, critic, separate["reference"], separate["reward"]]):
        result.losses = loop.train(actor, separate["reference"], critic, separate["reward"], steps=STEPS)


if __name__ == "__main__":
    common.main("loop", ("hydra-ppo",), patched, unpatched)
