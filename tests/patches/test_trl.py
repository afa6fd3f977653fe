"""The unmodified TRL 1.12 trainer on role views, in this environment; other hosts run in `make test-hosts`."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_ppo.experience import Experience
from hydra_ppo.patches import trl, trl_train
from hydra_ppo.patches.versions import HostError
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


CHAT = "{% for m in messages %}<|user|>{{ m.content }}<|eot|>{% endfor %}"


def chat_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One whose turns end in its eos, with tokens that no text holds."""
    words = ["<|unk|>", "<|bos|>", "<|eot|>", "<|reserved|>", "<|user|>", *(f"w{i}" for i in range(common.VOCABULARY - 5))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eot|>", pad_token="<|eot|>", **special
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def test_an_end_is_never_taken_for_padding(tmp_path, caplog):
    """With the end of a turn as pad token, TRL would mask every turn's end in a prompt and read the score before the last."""
    model = common.hydra_model()
    model.trained_end = 2
    tokenizer = chat_tokenizer(additional_special_tokens=["<|user|>", "<|reserved|>"])
    with trl.apply(model) as arguments, caplog.at_level(logging.WARNING, "hydra_ppo"):
        host = check_trl_train.trainer(tmp_path, [], arguments, processing_class=tokenizer, response_length=4)
        pad = host.processing_class.pad_token_id
        assert pad == 3  # <|reserved|>: <|user|> stands in the template
        assert tokenizer.pad_token == "<|eot|>"  # the tokenizer is as it came
        assert "it pads with '<|reserved|>', in a copy" in caplog.text
        ends = [2, 9, 9, 2, 9, 2]  # two turns in the prompt, an answer of one word
        row = torch.tensor([[pad, pad, 1, *ends, pad]])
        _, score, _ = check_trl_train.TRAINER.get_reward(arguments["reward_model"], row, pad, 7)
        with torch.no_grad(), model.role("reward"):
            exact = model.scores(Experience.from_lists([[1, *ends[:4]]], [ends[4:]], 0, model.device).sequences())
        torch.testing.assert_close(score, exact, rtol=1e-5, atol=1e-6)
        host.save_model(str(tmp_path / "saved"))
        assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").pad_token == "<|eot|>"


def test_a_vocabulary_without_a_token_to_pad_with_is_refused(tmp_path):
    tokenizer = chat_tokenizer(additional_special_tokens=["<|user|>"])
    with (
        trl.apply(common.hydra_model()) as arguments,
        pytest.raises(HostError, match=r"tokenizer.pad_token='<\|eot\|>' ends answers too"),
    ):
        check_trl_train.trainer(tmp_path, [], arguments, processing_class=tokenizer)


def test_a_stop_token_that_is_not_the_trained_end_is_named(tmp_path, caplog):
    model = common.hydra_model()
    model.trained_end = 7
    with trl.apply(model) as arguments, caplog.at_level(logging.WARNING, "hydra_ppo"):
        check_trl_train.trainer(tmp_path, [], arguments)
    assert "is not the token that the reward head was trained at; set stop_token=None, stop_token_id=7" in caplog.text
