"""ms-swift's `rlhf_main` for PPO, patched and as its users run it with LoRA.

python tests/hosts/check_swift.py --mode patched|unpatched --folder F --output result.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "hosts" / "swift")]
os.environ |= {"USE_HF": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import make_inputs  # noqa: E402
import swift.rlhf_trainers.ppo_trainer  # noqa: E402, F401  takes `__init__` from the class in TRL for good: before the watch
import torch  # noqa: E402
import torch.utils.checkpoint as checkpointing  # noqa: E402
import trl.experimental.ppo.ppo_trainer as trl_ppo  # noqa: E402
from swift.pipelines.train.rlhf import SwiftRLHF  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hydra_ppo.compute import recompute  # noqa: E402
from hydra_ppo.model.hydra import HydraModel  # noqa: E402
from hydra_ppo.patches import swift as patch  # noqa: E402
from hydra_ppo.views.view import View  # noqa: E402
from tests.hosts.common import (  # noqa: E402
    Result,
    difference,
    main,
    save_tuned,
    separate_models,
    watch,
    watch_training,
    watch_undo,
)

SETTINGS = {
    "rlhf_type": "ppo",
    "model_type": "qwen3",
    "template": "chatml",
    "check_model": "false",
    "tuner_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "torch_dtype": "float32",
    "attn_impl": "sdpa",
    "split_dataset_ratio": 0,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "max_length": 128,
    "max_completion_length": 24,
    "temperature": 0.7,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 1,
    "num_ppo_epochs": 3,
    "local_rollout_forward_batch_size": 8,
    "num_train_epochs": 1,
    "num_sample_generations": 0,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "no",
    "report_to": "none",
    "add_version": "false",
}
ROWS = 48  # six updates of eight rows
PROMPT = 12  # columns of the prompts that `compare` takes


def command(folder: Path, **changes: object) -> list[str]:
    """Return the arguments of `swift rlhf` on what `make_inputs` wrote."""
    settings = SETTINGS | {"model": folder / "base", "dataset": folder / "prompts.jsonl", "output_dir": folder / "ppo"}
    return [str(part) for name, value in (settings | changes).items() for part in (f"--{name}", value)]


def patched(result: Result, folder: Path) -> None:
    """Train through the pipeline that the command line runs, under the patch that the plugin installs."""
    make_inputs.make(folder, ROWS)
    tuned = save_tuned(folder / "tuned", folder / "base")
    assert recompute.checkpoint is checkpointing.checkpoint  # bound before swift's trainer replaces it
    with watch_undo(result, [SwiftRLHF, trl_ppo, trl_ppo.PPOTrainer, recompute]):
        with patch.apply():
            pipeline = SwiftRLHF(command(folder, reward_model=tuned))
            actor = pipeline.model
            disturb(actor.hydra)
            compare(result, pipeline, pipeline.tokenizer.pad_token_id)
            with watch_training(result, actor.hydra):
                result.losses = value_losses(pipeline.main())
            assert set(patch.ATTRIBUTES) <= set(vars(actor))
        assert not set(patch.ATTRIBUTES) & set(vars(actor))
    check_saved(folder / "ppo" / f"checkpoint-{ROWS // 8}", actor.hydra)
    check_inert(folder)


def disturb(model: HydraModel) -> None:
    """Let all four roles differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in model.trainable_roles:
            for parameter in model.role_parameters(role).values():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.02


def compare(result: Result, pipeline: SwiftRLHF, pad: int) -> None:
    """Compare what TRL's train() takes from the views with what it takes from separate models."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(10, 200, (4, PROMPT + 8), generator=generator)
    for row, width in enumerate((0, 3, 7, 1)):
        rows[row, :width] = pad
    rows[1, -2:] = pad
    counts = rows[:, PROMPT:] != pad
    views = {"actor": pipeline.model, "reference": pipeline.ref_model}
    views |= {"critic": pipeline.value_model, "reward": pipeline.reward_model}
    separate = separate_models(pipeline.model.hydra)
    found, expected = ({role: numbers(role, model, rows, pad) for role, model in of.items()} for of in (views, separate))
    for name, role in (("logprobs", "actor"), ("ref_logprobs", "reference"), ("values", "critic")):
        result.differences[name] = difference(found[role], expected[role], counts)
    result.differences["scores"] = difference(found["reward"], expected["reward"])


@torch.no_grad()
def numbers(role: str, model: nn.Module, rows: Tensor, pad: int) -> Tensor:
    """Return log-probs (B, R), values (B, R) or scores (B,), by TRL's functions as train() calls them."""
    if role in ("critic", "reward"):
        values, scores, _ = trl_ppo.get_reward(model, rows, pad, PROMPT)
        return scores if role == "reward" else values[:, PROMPT - 1 : -1, 0]
    logits = trl_ppo.forward(model, rows, pad).logits[:, PROMPT - 1 : -1]
    logits /= SETTINGS["temperature"] + 1e-7
    return trl_ppo.selective_log_softmax(logits, rows[:, PROMPT:])


def value_losses(message: dict[str, Any]) -> list[float]:
    return [float(entry["loss/value_avg"]) for entry in message["log_history"] if "loss/value_avg" in entry]


def check_saved(folder: Path, model: HydraModel) -> None:
    """Check that swift's own way of saving left the trained adapters, a tokenizer, and no base."""
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("model*.safetensors"))
    saved = HydraModel.from_pretrained(folder, device="cpu")
    for role in model.trainable_roles:
        pairs = zip(model.role_parameters(role).values(), saved.role_parameters(role).values(), strict=True)
        assert all(torch.equal(trained.cpu(), read) for trained, read in pairs), role


def check_inert(folder: Path) -> None:
    """Check that a reward classifier gives swift's own models, under the patch too."""
    with patch.apply():
        pipeline = SwiftRLHF(command(folder, reward_model=folder / "reward", output_dir=folder / "inert"))
    assert not any(isinstance(model, View) for model in (pipeline.model, pipeline.value_model, pipeline.reward_model))
    assert pipeline.ref_model is None


def unpatched(result: Result, folder: Path) -> None:
    """Train with LoRA on the policy, whose reference is the policy without it, and separate value and reward models."""
    make_inputs.make(folder, ROWS)
    pipeline = SwiftRLHF(command(folder, reward_model=folder / "reward"))
    with watch(result, [pipeline.model, pipeline.value_model, pipeline.reward_model]):
        result.losses = value_losses(pipeline.main())


if __name__ == "__main__":
    main("ms-swift", ("ms-swift", "trl"), patched, unpatched)
