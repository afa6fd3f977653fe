"""Trains with LLaMA-Factory's own PPO, over one base or over the models that it loads itself.

python tests/hosts/check_llamafactory.py --mode patched --folder F --output result.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "hosts" / "llamafactory")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
import yaml  # noqa: E402
from make_inputs import make  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hydra_ppo.model.hydra import HydraModel  # noqa: E402
from hydra_ppo.patches.step_passes import DeferredValues  # noqa: E402
from tests.hosts import common  # noqa: E402


def settings(folder: Path, reward_model: Path, **changes: Any) -> dict[str, Any]:
    """Return the example's ppo.yaml on inputs in `folder`."""
    found = yaml.safe_load((ROOT / "examples" / "hosts" / "llamafactory" / "ppo.yaml").read_text())
    return found | {
        "model_name_or_path": str(folder / "base"),
        "reward_model": str(reward_model),
        "dataset_dir": str(folder / "data"),
        "output_dir": str(folder / "out"),
        "save_steps": 3,
        "use_cpu": True,
        **changes,
    }


@contextmanager
def training_as(train: Callable[[Any, Callable[[], None]], None], losses: list[float]) -> Iterator[None]:
    """Call `train(trainer, go)` where LLaMA-Factory trains, and collect the value losses of its steps.

    Its autocast is off: bf16 would hide differences, and is slow on a CPU.
    """
    from llamafactory.train.ppo.trainer import CustomPPOTrainer

    original = CustomPPOTrainer.ppo_train

    def ppo_train(self: Any, *args: Any, **kwargs: Any) -> None:
        unwatched, self.amp_context = self.step, nullcontext()

        def watched(*args: Any, **kwargs: Any) -> Any:
            statistics = unwatched(*args, **kwargs)
            losses.append(float(statistics["ppo/loss/value"]))
            return statistics

        self.step = watched
        train(self, lambda: original(self, *args, **kwargs))

    CustomPPOTrainer.ppo_train = ppo_train
    try:
        yield
    finally:
        CustomPPOTrainer.ppo_train = original


def patched(result: common.Result, folder: Path) -> None:
    """Train on one base; compare with four separate models first."""
    import llamafactory.train.ppo.workflow as workflow
    import trl.trainer.ppo_trainer as trl_trainer
    from llamafactory.train import tuner
    from llamafactory.train.ppo import trainer as trainer_module

    from hydra_ppo.patches import llamafactory

    torch.manual_seed(0)
    make(folder, common.tiny_config())
    tuned = common.save_tuned(folder / "sft", folder / "base")

    def train(trainer: Any, go: Callable[[], None]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model).hydra
        result.differences = differences(trainer, model)
        known = trainer.ref_model.known
        known.kept = known.used = 0
        with common.watch_training(result, model):
            go()
        result.notes.append(f"rows scored {known.kept}, of which the reference needed no pass for {known.used}")
        if not known.kept == known.used > 0:
            result.problems.append(result.notes[-1])

    owners = [workflow, tuner, trainer_module, trainer_module.CustomPPOTrainer, trl_trainer, trl_trainer.PPOTrainer]
    with common.watch_undo(result, owners), llamafactory.apply(), training_as(train, result.losses):
        tuner.run_exp(settings(folder, tuned))
    again = HydraModel.from_pretrained(folder / "out", dtype="fp32")
    result.notes.append(f"saved {sorted(path.name for path in (folder / 'out').iterdir())}, loads at stage {again.train_stage}")


def unpatched(result: common.Result, folder: Path) -> None:
    """Train as LLaMA-Factory's users do: a policy with LoRA, and a reward model of its own."""
    from llamafactory.train import tuner
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    make(folder, common.tiny_config())
    reward = folder / "reward"
    LlamaForCausalLM(common.tiny_config()).save_pretrained(reward)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (reward / name).write_bytes((folder / "base" / name).read_bytes())
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)) * 0.1
    head = {"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}
    save_file(head, reward / "value_head.safetensors", {"format": "pt"})

    def train(trainer: Any, go: Callable[[], None]) -> None:
        models = [trainer.model, trainer.reward_model]
        before = [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
        with common.watch(result, models):
            go()
        after = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        if any(not torch.equal(*pair) for pair in zip(before, after, strict=True)):
            result.changed.append("policy")

    with training_as(train, result.losses):
        tuner.run_exp(settings(folder, reward, lora_rank=16, lora_target="all"))


@torch.no_grad()
def differences(trainer: Any, model: HydraModel) -> dict[str, float]:
    """Compare LLaMA-Factory's numbers on role views with those on separate models, all roles apart."""
    generator = torch.Generator().manual_seed(4)
    kept = {n: p.clone() for role in model.trainable_roles for n, p in model.role_parameters(role).items()}
    for role in model.trainable_roles:
        for parameter in model.role_parameters(role).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    separate = common.separate_models(model)
    side, trainer.tokenizer.padding_side = trainer.tokenizer.padding_side, "right"
    queries = [torch.tensor(ids) for ids in common.prompts(8, length=10)]
    responses = [torch.tensor(ids[: 4 + row]) for row, ids in enumerate(common.prompts(8, length=12, seed=5))]
    found: dict[str, float] = {}

    def numbers(policy: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, _, values, masks = trainer.batched_forward_pass(policy, queries, responses, inputs)
        return logprobs, values, masks

    views = trainer.model, trainer.ref_model
    logprobs, values, masks = numbers(views[0])
    found["logprobs"] = common.difference(logprobs, numbers(with_head(separate["actor"]))[0], masks)
    found["values"] = common.difference(values, numbers(with_head(separate["critic"]))[1], masks)
    expected = numbers(with_head(separate["reference"]))[0]
    found["ref_logprobs"] = common.difference(numbers(views[1])[0], expected, masks)

    def scores() -> Tensor:  # mini-batches, as LLaMA-Factory's loop has them
        size = trainer.config.mini_batch_size
        parts = [trainer.get_rewards(queries[i : i + size], responses[i : i + size]) for i in range(0, len(queries), size)]
        return torch.cat(parts)

    from_view, reward, known = scores(), trainer.reward_model, trainer.ref_model.known
    before = known.used
    found["ref_logprobs of the reward's pass"] = common.difference(numbers(views[1])[0], expected, masks)
    assert known.used == before + len(queries)
    trainer.reward_model = with_head(separate["reward"])
    found["scores"] = common.difference(from_view, scores())
    trainer.reward_model = reward
    known.end_step()

    # The update takes the entropy of the very logits whose log-probs it took, and leaves the critic for later.
    inputs = trainer.prepare_model_inputs(queries[:4], responses[:4])
    entropies, later = [], []
    import trl.trainer.ppo_trainer as trl_trainer

    for policy in (views[0], with_head(separate["actor"])):
        with torch.enable_grad():
            _, logits, update, _ = trainer.batched_forward_pass(policy, queries[:4], responses[:4], inputs, return_logits=True)
        entropies.append(trl_trainer.entropy_from_logits(logits))
        later.append(update)
    assert isinstance(later[0], DeferredValues)
    width = entropies[0].shape[1]
    found["values of the update"] = common.difference(later[0].materialize(), values[:4, :width], masks[:4, :width])
    found["entropy"] = common.difference(*entropies, masks[:4, :width])

    trainer.tokenizer.padding_side = side
    for role in model.trainable_roles:
        for name, parameter in model.role_parameters(role).items():
            parameter.copy_(kept[name])
    return found


def with_head(model: Any) -> nn.Module:
    """Return TRL's model with a value head around a separate model; of a classifier, its score is the head."""
    from transformers import AutoModelForCausalLM
    from trl import AutoModelForCausalLMWithValueHead

    causal = model if hasattr(model, "lm_head") else AutoModelForCausalLM.from_config(model.config)
    causal.model = model.model
    wrapped = AutoModelForCausalLMWithValueHead(causal).eval()
    wrapped.is_peft_model = False
    if hasattr(model, "score"):
        wrapped.v_head.summary.weight.copy_(model.score.weight)
        wrapped.v_head.summary.bias.zero_()
    return wrapped


if __name__ == "__main__":
    common.main("llamafactory", ("llamafactory", "trl"), patched, unpatched)
