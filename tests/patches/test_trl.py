"""The unmodified TRL 1.12 trainer on role views, in this environment; other hosts run in `make test-hosts`."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

from hydra_ppo.patches import trl, trl_train
from hydra_ppo.views.sampled_logits import SampledLogits
from hydra_ppo.views.views import role_views
from tests.hosts import check_trl_train, common
from tests.hosts.run import judge

ROOT = Path(__file__).parents[2]


def test_trl_trains_on_views_as_on_separate_models(tmp_path):
    result = common.Result("TRL", "patched", {})
    check_trl_train.patched(result, tmp_path)
    row = {"patched": vars(result), "unpatched": {"losses": [1.0] * 3, "problems": [], "peak_bytes": sys.maxsize}}
    assert judge(row) == []
    saved = json.loads((tmp_path / "saved" / "hydra.json").read_text())
    assert saved["roles"]["critic"] == {"adapter": "critic", "head": "value"}


def test_other_models_run_as_if_nothing_were_patched(tmp_path):
    """Separate models under the patch and without it: the same losses to the last bit."""
    found = []
    for patched in (False, True):
        model = common.hydra_model()
        models = common.separate_models(model)
        arguments = {
            "model": models["actor"],
            "ref_model": models["reference"],
            "reward_model": models["reward"],
            "value_model": models["critic"],
        }
        applied = trl.apply(model) if patched else None
        losses: list[float] = []
        host = check_trl_train.trainer(tmp_path, losses, arguments, total_episodes=32, response_length=6, num_ppo_epochs=1)
        torch.manual_seed(6)
        check_trl_train.TRAINER.np.random.seed(0)
        host.train()
        host.save_model(str(tmp_path / f"saved-{patched}"))
        found.append(losses)
        assert (tmp_path / f"saved-{patched}" / "model.safetensors").is_file()
        if applied:
            applied.undo()
    assert found[0] == found[1]


def test_rollout_keeps_the_samplers_log_probs():
    model = common.hydra_model()
    views = role_views(model)
    queries = torch.tensor(common.prompts(3))
    queries[1, :5] = common.PAD
    views.actor.generation_config.eos_token_id = None
    config = check_trl_train.TRAINER.GenerationConfig(max_new_tokens=7, temperature=0.7, top_k=0, top_p=1.0, do_sample=True)
    sequences, logits = trl_train.rollout(views.actor, queries, 2, common.PAD, config)
    assert isinstance(logits, SampledLogits)
    assert sequences.shape == (3, 23)
    assert torch.equal(sequences[:, :16], queries)
    with torch.no_grad():
        mask = (sequences != common.PAD).long()
        exact = views.actor(sequences, mask).logits[:, 15:-1] / 0.7
        expected = exact.token_logprobs(sequences[:, 16:]).logprobs
    torch.testing.assert_close(logits.gather(-1, sequences[:, 16:, None])[..., 0], expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    again = [trl_train.rollout(views.actor, queries, 2, common.PAD, config)[0] for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(trl_train.rollout(views.actor, queries, 2, common.PAD, config)[0], again[0])
    assert not torch.equal(again[0], again[1])


def test_checkpointing_that_trl_would_not_do_is_named(tmp_path, caplog):
    model = common.hydra_model()
    with trl.apply(model) as arguments, caplog.at_level(logging.WARNING, "hydra_ppo"):
        options = {"total_episodes": 16, "response_length": 2, "num_ppo_epochs": 1, "gradient_checkpointing": True}
        check_trl_train.trainer(tmp_path, [], arguments, **options).train()
    assert "gradient_checkpointing=True does nothing in TRL's PPO" in caplog.text


@pytest.mark.parametrize("script", ["trl_train.py", "loop.py"])
def test_examples_run(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(str(ROOT / "examples" / "hosts" / script), run_name="__main__")
    assert capsys.readouterr().out.count("score") >= 3


def test_generation_settings_that_a_rollout_leaves_out_are_named_once(caplog, monkeypatch):
    monkeypatch.setattr(trl_train, "_named", set())
    actor = role_views(common.hydra_model()).actor
    actor.generation_config.repetition_penalty = 1.05
    config = check_trl_train.TRAINER.GenerationConfig(max_new_tokens=2, temperature=1.0, do_sample=True)
    for _ in range(2):
        trl_train.rollout(actor, torch.tensor(common.prompts(2)), 2, common.PAD, config)
    assert caplog.text.count("generation_config.repetition_penalty=1.05 of the model is left out of the rollout") == 1
