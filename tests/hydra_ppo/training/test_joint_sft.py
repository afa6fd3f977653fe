"""Joint SFT + reward modelling: the loss by hand, batch-size independence, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.training.joint_sft import JointSFTTrainer
from tests.families import randomise
from tests.training import hydra, pairs, sft_config

CLOSE = 1e-5


class Memo:
    """A recorder that remembers."""

    def __init__(self):
        self.steps, self.alarms = [], []

    def log(self, step, metrics):
        self.steps.append((step, dict(metrics)))

    def samples(self, step, rows):
        pass

    def alarm(self, step, name, line, values):
        self.alarms.append((step, name, line, dict(values)))

    def note(self, text):
        pass

    def progress(self, total, description):
        from hydra_ppo.runtime.recorder import Silent

        return Silent().progress(total, description)


def train(model, config, rows=None, **options):
    return JointSFTTrainer(model, config, rows or pairs(), pairs(80)[64:], pad_token_id=0, **options)


def test_loss_equals_plain_hugging_face_code():
    model = hydra("sft")
    randomise(model)
    rows = pairs(5)
    sums = train(model, sft_config()).pass_over(rows)
    nll = ranking = 0.0
    for row in rows:
        with torch.no_grad(), model.role("reference"):
            out = {}
            for side, response in (("w", row.chosen_ids), ("l", row.rejected_ids)):
                ids = torch.tensor([[*row.prompt_ids, *response]])
                hidden = model.architecture.backbone(input_ids=ids).last_hidden_state
                out[side] = model.heads["reward"](hidden[0, -1]).item()
                if side == "w":
                    log_p = torch.log_softmax(model.architecture.output_embeddings(hidden[0]), -1)
                    start = len(row.prompt_ids)
                    nll -= sum(log_p[start - 1 + i, t].item() for i, t in enumerate(response))
            ranking += math.log1p(math.exp(-(out["w"] - out["l"])))
    assert sums.nll.item() == pytest.approx(nll, rel=CLOSE)
    assert sums.ranking.item() == pytest.approx(ranking, rel=CLOSE)


@pytest.mark.parametrize("coefs", [{}, {"sft_coef": 0.0}, {"reward_coef": 0.0}], ids=["joint", "reward only", "sft only"])
def test_a_step_does_not_depend_on_the_microbatch_size(coefs):
    gradients = []
    for size in (1, 3, 8):
        config = sft_config(microbatch_size=size, **coefs)
        model = hydra(config.stage)
        randomise(model)
        trainer = train(model, config)
        captured = {}
        trainer.optimizer.step = lambda captured=captured, model=model: captured.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        trainer.step(0, pairs(8))
        gradients.append(captured)
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_lora_training_learns_both_and_leaves_the_base_alone(quantization):
    model = hydra("sft", quantization=quantization, lora=LoraSettings(r=8))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    memo, saves = Memo(), []
    summary = train(model, sft_config(epochs=6, reward_coef=0.5), run=memo, save_best=lambda: saves.append(1)).train()
    (begin, before), (_, first) = [(step, m) for step, m in memo.steps if "eval/perplexity" in m][:2]
    assert begin == 0
    assert first["eval/perplexity"] < before["eval/perplexity"]
    assert summary["eval/perplexity"] < first["eval/perplexity"] < 32
    assert summary["eval/reward_accuracy"] > 0.9
    assert len(saves) >= 1
    assert model.reward_head_trained
    for name, value in frozen.items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_full_fine_tuning_trains_the_base():
    model = hydra("base")
    before = model.architecture.output_embeddings.weight.detach().clone()
    summary = train(model, sft_config(method="full", epochs=4)).train()
    assert not torch.equal(before, model.architecture.output_embeddings.weight)
    assert summary["eval/reward_accuracy"] > 0.9


def test_full_fine_tuning_in_bf16_keeps_fp32_weights(tmp_path):
    from hydra_ppo.model.hydra import HydraModel
    from tests.training import write_model

    model = HydraModel.from_pretrained(write_model(tmp_path / "base"), train="base", dtype="bf16")
    assert model.causal_lm.dtype == torch.float32
    assert train(model, sft_config(method="full", epochs=4)).train()["eval/reward_accuracy"] > 0.9


def test_what_is_not_trained_is_null():
    memo = Memo()
    train(hydra("sft"), sft_config(reward_coef=0.0, epochs=1), run=memo).train()
    assert {m["loss/reward"] for step, m in memo.steps if step} == {None}
    model = hydra("reward")
    memo = Memo()
    summary = train(model, sft_config(sft_coef=0.0, adapter="reward", epochs=1), run=memo).train()
    assert {m["loss/sft"] for step, m in memo.steps if step} == {None}
    assert summary["eval/perplexity"] is None


def test_stage_and_method_must_fit():
    with pytest.raises(ConfigError, match="needs a model at stage 'base', not 'sft'; build it with train='base'"):
        train(hydra("sft"), sft_config(method="full"))


def test_a_non_finite_loss_names_step_phase_and_quantity_and_changes_nothing():
    model = hydra("sft")
    trainer = train(model, sft_config())
    trainer.step(0, pairs(8))
    with torch.no_grad():
        model.heads["reward"].weight.fill_(float("nan"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step=2 phase=update: loss/reward is nan"):
        trainer.step(1, pairs(8))
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) or name == "heads.reward.weight"


def test_max_steps_and_memory_by_phase():
    memo = Memo()
    config = sft_config(max_steps=3)
    config = replace(config, run=replace(config.run, memory="always"))
    assert train(hydra("sft"), config, run=memo).train()["steps"] == 3
    assert all(m["memory/update_peak_bytes"] > 0 for step, m in memo.steps if step)
