"""Reward sources: what they may be, how they mix, and what happens when one misbehaves."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hydra_ppo.config.settings import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, NonFiniteError, RewardError
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import RunningMoments, Scorer
from tests.training import llama, tokenizer

CPU = torch.device("cpu")
HERE = "tests.hydra_ppo.rewards.test_scorer"
PROMPTS, RESPONSES = ["w1 w2", "w3"], ["w4 w5", "w6"]


def words(prompts, responses):
    return [len(r.split()) for r in responses]


def as_tensor(prompts, responses):
    return torch.tensor([[1.0], [2.0]])


def raises(prompts, responses):
    raise KeyError("gone")


def too_few(prompts, responses):
    return [1.0]


def nothing(prompts, responses):
    return None


def text(prompts, responses):
    return ["high", "low"]


def infinite(prompts, responses):
    return [0.0, math.inf]


NUMBER = 3


def scorer(*sources: RewardSource, **settings) -> Scorer:
    return Scorer(RewardSettings(isolation="thread", sources=list(sources) or [RewardSource()], **settings), CPU)


def function(name: str, weight: float = 1.0) -> RewardSource:
    return RewardSource("function", f"{HERE}:{name}", weight)


def raw(found: Scorer) -> list[float]:
    return found.raw([10.0, 20.0], PROMPTS, RESPONSES, "step=7 phase=score")


def test_the_head_alone_is_the_default():
    assert raw(scorer()) == [10.0, 20.0]
    assert scorer().needs_head
    assert not scorer(function("words")).needs_head


def test_sources_add_up_with_their_weights():
    # 0.5 * (10, 20) + 2 * (2, 1)
    assert raw(scorer(RewardSource(weight=0.5), function("words", 2.0))) == [9.0, 12.0]


def test_a_tensor_is_as_good_as_a_list():
    assert raw(scorer(function("as_tensor"))) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "raises",
            RewardError,
            r"step=7 phase=score: function .*:raises raised KeyError: 'gone' .*, in raises.; mend",
        ),
        ("too_few", RewardError, r"returned 1 numbers for 2 responses; it must return one for each"),
        ("nothing", RewardError, r"returned NoneType; it must return one number per response"),
        ("text", RewardError, r"returned list; it must return one number per response"),
        ("infinite", NonFiniteError, r"step=7 phase=score: reward of function .*:infinite is inf for response 1"),
    ],
)
def test_a_function_that_misbehaves_stops_with_step_and_phase(name, error, message):
    with pytest.raises(error, match=message):
        raw(scorer(function(name)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no.such.module:f", "cannot be imported"),
        (f"{HERE}:no_such_function", "cannot be imported"),
        (f"{HERE}:NUMBER", "is not callable"),
    ],
)
def test_a_function_that_cannot_be_found_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        scorer(RewardSource("function", target))


@pytest.mark.parametrize("labels", [1, 2])
def test_a_classifier_gives_its_logit_or_log_odds(tmp_path, labels):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama(num_labels=labels)).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    found = raw(scorer(RewardSource("classifier", str(tmp_path))))
    for value, prompt, response in zip(found, PROMPTS, RESPONSES, strict=True):
        # Text is joined as it stands: "w1 w2" + "w4 w5" has the unknown word "w2w4" in the middle. The end follows it.
        with torch.no_grad():
            logits = model(tokenizer()(prompt + response + " <eos>", return_tensors="pt")["input_ids"]).logits[0]
        assert value == pytest.approx((logits[0] if labels == 1 else logits[1] - logits[0]).item(), abs=1e-5)


def test_a_classifier_of_three_labels_or_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded as a classifier"):
        scorer(RewardSource("classifier", str(tmp_path)))
    LlamaForSequenceClassification(llama(num_labels=3)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has 3 labels; .*with one label or two, or .*LABEL_0, LABEL_1, LABEL_2"):
        scorer(RewardSource("classifier", str(tmp_path)))


def test_every_source_is_told_apart_also_one_of_weight_0():
    found = scorer(RewardSource(weight=0.5), function("words", 2.0), function("as_tensor", 0.0))
    scores = found.score([10.0, 20.0], Responses.of_text(PROMPTS, RESPONSES), "here")
    assert scores.total == [9.0, 12.0]  # 0.5 * (10, 20) + 2 * (2, 1) + 0 * (1, 2)
    assert scores.parts == {"head": [10.0, 20.0], "words": [2.0, 1.0], "as_tensor": [1.0, 2.0]}
    assert scores.rows() == [{"head": 10.0, "words": 2.0, "as_tensor": 1.0}, {"head": 20.0, "words": 1.0, "as_tensor": 2.0}]


def test_names_are_given_or_of_the_kind_and_no_two_alike():
    sources = [
        *(RewardSource(), RewardSource("function", "a:judge"), RewardSource("function", "b:judge")),
        *(RewardSource("classifier", "x"), RewardSource("classifier", "y", name="safe"), RewardSource("classifier", "z")),
        *(RewardSource("http", "http://x"), RewardSource("function", "c:judge", name="judge-2")),
    ]
    named = ["head", "judge", "judge-3", "classifier", "safe", "classifier-2", "http", "judge-2"]
    assert RewardSettings(isolation="thread", sources=sources).names == named


def test_one_name_for_two_sources_is_refused():
    with pytest.raises(ConfigError, match="name='a' is given to 2 of them; choose another for each"):
        RewardSettings(isolation="thread", sources=[RewardSource(name="a"), RewardSource("function", "m:f", name="a")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "name='a/b' is not made of letters"),
        ({"label": "x"}, "label='x' does not go with kind='head'; leave label out"),
        ({"kind": "function", "target": "m:f", "dtype": "bf16"}, "dtype='bf16' does not go with kind='function'"),
        ({"kind": "classifier", "target": "x", "timeout": 3.0}, "timeout=3.0 does not go with kind='classifier'"),
        ({"kind": "http", "target": "http://x", "quantization": "nf4"}, "quantization='nf4' does not go with kind='http'"),
        ({"kind": "http", "target": "http://x", "retries": -1}, "retries=-1 must not be negative"),
        ({"kind": "classifier", "target": "x", "batch_size": 0}, "batch_size=0 must be greater than 0"),
        ({"kind": "http", "target": "localhost:5000"}, "is not the address of a server; write http://host:port/path"),
    ],
)
def test_settings_that_a_source_would_pass_over_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardSource(**settings)


def test_clip_and_missing_end_penalty():
    # clipped to 5 each, then 2 off where the end is missing
    assert scorer(score_clip=5.0, missing_eos_penalty=2.0).shape([10.0, -20.0], [True, False]) == [5.0, -7.0]


def test_running_normalisation_by_hand():
    normalising = scorer(score_normalization=True)
    # first batch 1, 3: mean 2, std 1
    assert normalising.shape([1.0, 3.0], [True, True]) == pytest.approx([-1.0, 1.0])
    # all four 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert normalising.shape([5.0, 7.0], [True, True]) == pytest.approx([1 / math.sqrt(5), 3 / math.sqrt(5)])


def test_running_moments_do_not_depend_on_the_batches():
    torch.manual_seed(0)
    values = torch.randn(50).tolist()
    whole, parts = RunningMoments(), RunningMoments()
    whole.update(values)
    for start in range(0, 50, 7):
        parts.update(values[start : start + 7])
    assert (parts.mean, parts.std) == pytest.approx((whole.mean, whole.std))
    alike = RunningMoments()
    alike.update([2.0, 2.0])
    assert alike.std == 1.0
