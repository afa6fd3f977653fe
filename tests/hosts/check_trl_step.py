"""TRL's step-style `PPOTrainer` (0.8 to 0.11) on role views, and as its users run it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.trainer import ppo_trainer

from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches.trl import apply
from hydra_ppo.views.views import role_views
from tests.hosts import common
from tests.hosts.common import BOS, EOS, PAD, VOCABULARY, Result, difference

UPDATES = 6
ROWS = 8
NEW_TOKENS = 20
STATS = {  # of one step that changes nothing: what is compared, and as what
    "objective/kl": "step_kl",
    "objective/kl_dist": "step_kl",
    "objective/entropy": "step_logprobs",
    "ppo/mean_non_score_reward": "step_kl",
    "ppo/policy/entropy": "step_entropy",
    "ppo/policy/policykl": "step_policykl",
    "ppo/loss/policy": "step_loss",
    "ppo/loss/value": "step_loss",
    "ppo/returns/mean": "step_returns",
    "ppo/val/vpred": "step_values",
}


class Separate(AutoModelForCausalLMWithValueHead):
    """A causal LM and a classifier that share nothing, as one model with a value head."""

    is_peft_model = False

    def __init__(self, causal_lm: nn.Module, classifier: nn.Module) -> None:
        nn.Module.__init__(self)
        self.pretrained_model, self.classifier = causal_lm, classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, None, Tensor]:
        logits = self.pretrained_model(input_ids, attention_mask=attention_mask).logits
        hidden = self.classifier.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return logits, None, self.classifier.score(hidden).squeeze(-1)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of numbers."""
    vocabulary = {str(token): token for token in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=str(BOS)))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=str(PAD), bos_token=str(BOS), eos_token=str(EOS), padding_side=side
    )


def config(**changes: Any) -> PPOConfig:
    """Settings of both modes: two mini-batches to an optimizer step."""
    settings: dict[str, Any] = {
        "batch_size": ROWS,
        "mini_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ppo_epochs": 2,
        "learning_rate": 2e-3,
        "init_kl_coef": 0.05,
        "adap_kl_ctrl": False,
        "vf_coef": 0.5,
        "cliprange_value": 10.0,
        "seed": 0,
    }
    return PPOConfig(**settings | changes)


def rows() -> tuple[list[Tensor], list[Tensor]]:
    """Queries and responses of different lengths."""
    queries = [torch.tensor(ids[: 6 + row]) for row, ids in enumerate(common.prompts(ROWS, 16))]
    responses = [torch.tensor(ids[: 12 - row]) for row, ids in enumerate(common.prompts(ROWS, 16, seed=4))]
    return queries, responses


# -- views against separate models -----------------------------------------------------------------------------------------


def compare(result: Result, model: HydraModel, applied: Any, separate: dict[str, nn.Module], side: str, **changes: Any) -> None:
    """Fill `result.differences` from the trainer's own functions on views and on separate models."""
    name = "_".join([side, *changes.values()])
    trainers = (
        PPOTrainer(config(learning_rate=0.0, **changes), tokenizer=tokenizer(side), **applied),
        PPOTrainer(
            config(learning_rate=0.0, **changes),
            Separate(separate["actor"], separate["critic"]),
            Separate(separate["reference"], separate["critic"]),
            tokenizer=tokenizer(side),
        ),
    )
    queries, responses = rows()
    known = {"logprobs": [], "ref_logprobs": [], "values": [], "masks": []}
    for trainer in trainers:
        inputs = trainer.prepare_model_inputs(queries, responses)
        with torch.no_grad():
            logprobs, _, values, masks = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
            ref_logprobs = trainer.batched_forward_pass(trainer.ref_model, queries, responses, inputs)[0]
        for key, numbers in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs), ("values", values), ("masks", masks)):
            known[key].append(numbers)
    masks = known.pop("masks")
    assert torch.equal(*masks)
    for key, (found, expected) in known.items():
        note(result, key, difference(found, expected, masks[0]))

    inputs = trainers[0].prepare_model_inputs(queries, responses)
    scores = role_views(model).reward(**inputs).logits[:, 0]  # the step below takes the reference's log-probs from this pass
    expected_scores = separate["reward"].model(**inputs).last_hidden_state
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(dim=1)
    expected_scores = separate["reward"].score(expected_scores)[torch.arange(ROWS), last, 0]
    note(result, "scores", difference(scores, expected_scores))

    response_masks = [torch.ones_like(response) for response in responses]
    response_masks[1][:3] = 0
    stats = []
    for trainer in trainers:
        np.random.seed(0)
        before = role_views(model).reference.passes.reused
        stats.append(trainer.step(queries, responses, list(scores), None if side == "left" else response_masks))
        assert role_views(model).reference.passes.reused == before
    for key, title in STATS.items():
        found, expected = (torch.as_tensor(np.asarray(part[key])) for part in stats)
        note(result, title, difference(found, expected))
    result.notes.append(f"{name}: KL {stats[0]['objective/kl']:.5f}, of separate models {stats[1]['objective/kl']:.5f}")


def note(result: Result, key: str, gap: float) -> None:
    """Keep the largest."""
    result.differences[key] = max(gap, result.differences.get(key, 0.0))


def compare_gradients(
    result: Result, model: HydraModel, applied: Any, separate: dict[str, nn.Module], side: str, inside: bool
) -> None:
    """Backward the trainer's summed loss once, with the views and with separate models.

    A separate model has merged weights W + s B A, whose gradient G gives s G A^T for B and s B^T G for A.

    Args:
        inside: whether the trainer's `train_minibatch` does it; otherwise its `loss`, as code of a user's own might.
    """
    queries, responses = rows()
    generator = torch.Generator().manual_seed(5)
    settings = config(batch_size=2 * ROWS, mini_batch_size=ROWS)
    for trained in (applied["model"], Separate(separate["actor"], separate["critic"])):
        trainer = PPOTrainer(settings, trained, applied["ref_model"], tokenizer=tokenizer(side))
        inputs = trainer.prepare_model_inputs(queries, responses)
        forward = trainer.batched_forward_pass
        logprobs, logits, values, masks = forward(trained, queries, responses, inputs, return_logits=True)
        noise = [torch.randn(masks.shape, generator=generator.manual_seed(seed)) for seed in range(4)]
        old = logprobs.detach() + 0.1 * noise[0]
        trained.zero_grad()
        with trainer.accelerator.accumulate(trained):  # the first of two: no optimizer step
            if inside:
                trainer.train_minibatch(old, noise[1], logprobs, logits, values, masks, noise[2], noise[3])
            else:
                policy, value, _ = trainer.loss(old, noise[1], logits, values, logprobs, masks, noise[2], noise[3])
                trainer.accelerator.backward(policy + value)
    largest = 0.0
    for name, module in model.causal_lm.named_modules():
        for role in ("actor", "critic"):
            if isinstance(module, LoraLayer):
                a, b = module.lora_A[role].weight, module.lora_B[role].weight
                whole = module.scaling[role] * separate[role].get_parameter(f"{name}.weight").grad
                largest = max(largest, relative(b.grad, whole @ a.T), relative(a.grad, b.T @ whole))
    largest = max(largest, relative(model.heads["value"].weight.grad, separate["critic"].score.weight.grad))
    note(result, "gradients_checkpointed" if model.checkpointing else "gradients", largest)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


# -- training ------------------------------------------------------------------------------------------------------------


def train(result: Result, trainer: PPOTrainer, score: Any) -> None:
    """Generate, score and step on the same prompts, again and again."""
    queries, _ = rows()
    for _ in range(UPDATES):
        responses = trainer.generate(
            queries,
            batch_size=ROWS,
            return_prompt=False,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=PAD,
        )
        batch = trainer.tokenizer.pad(
            {"input_ids": [torch.cat(pair) for pair in zip(queries, responses, strict=True)]}, return_tensors="pt"
        )
        stats = trainer.step(queries, responses, list(score(**batch)))
        result.losses.append(float(stats["ppo/loss/value"]))


def patched(result: Result, folder: Path) -> None:
    model = common.hydra_model()
    separate = common.separate_models(model)
    vars(ppo_trainer).setdefault("__warningregistry__", {})  # Python puts it there at the module's first warning
    with common.watch_undo(result, [ppo_trainer, PPOTrainer]), apply(model) as applied:
        for side in ("right", "left"):
            compare(result, model, applied, separate, side)
            compare(result, model, applied, separate, side, kl_penalty="full")
        for checkpointing in (False, True):
            model.enable_checkpointing(checkpointing)
            for side, inside in (("right", True), ("left", True), ("left", False)):
                compare_gradients(result, model, applied, separate, side, inside)
        model.enable_checkpointing(False)
        model.zero_grad()
        del separate

        trainer = PPOTrainer(config(), tokenizer=tokenizer(), **applied)
        with common.watch_training(result, model):
            train(result, trainer, lambda **batch: role_views(model).reward(**batch).logits[:, 0])
        known = applied["ref_model"].known
        used = known.used - 2 * ROWS  # less those of two of the comparisons; the others need whole distributions
        result.notes.append(f"reference rows taken from the reward's pass: {used} of {UPDATES * ROWS} in training")
        if used != UPDATES * ROWS:
            result.problems.append(result.notes[-1])
        trainer.save_pretrained(str(folder / "saved"))
        names = {path.name for path in (folder / "saved").iterdir()}
        assert {"hydra.json", "actor", "critic", "heads.safetensors", "tokenizer.json"} <= names, names
        assert not any(path.stat().st_size > 2**20 for path in (folder / "saved").rglob("*") if path.is_file())
    result.undone = result.undone and not role_views(model).reference.passes.observers


def unpatched(result: Result, folder: Path) -> None:
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        AutoModelForCausalLM.from_config(common.tiny_config()), peft_config=lora
    )
    reward = AutoModelForSequenceClassification.from_config(common.tiny_config(num_labels=1)).eval()
    nn.init.normal_(reward.score.weight, std=0.1)
    trainer = PPOTrainer(config(), policy, tokenizer=tokenizer())
    with common.watch(result, [policy, reward]):
        train(result, trainer, torch.no_grad()(lambda **batch: reward(**batch).logits[:, 0]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    common.main("trl", ("trl", "accelerate"), patched, unpatched)
