"""What bends a draw, and what ends a response: the log-probs stay those of the policy itself."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.data.text import StopStrings
from hydra_ppo.errors import ConfigError
from hydra_ppo.experience import Experience
from hydra_ppo.rollout.collect import collect_experience, ending_alike, score
from hydra_ppo.rollout.sampling import sample
from tests.families import PROMPTS, VOCABULARY
from tests.hydra_ppo.rollout.test_collect import CLOSE, CPU, build, generator, logprobs_by_pass, settings
from tests.training import tokenizer

NO_END = [VOCABULARY + 1]


def check_logprobs(model, prompts, out, temperature=0.8):
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, prompts, out.responses, temperature), strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)


def test_ids_that_stand_for_no_token_are_never_drawn():
    model = build()
    never = list(range(5, VOCABULARY))
    out = sample(model, PROMPTS * 4, settings(), NO_END, generator(), never=never)
    assert {token for response in out.responses for token in response} <= set(range(5))
    check_logprobs(model, PROMPTS * 4, out)


@pytest.mark.parametrize("least", [1, 5, 11])
def test_no_end_before_min_new_tokens(least):
    model = build()
    ends = list(range(2, 40))
    out = sample(model, PROMPTS * 4, settings(min_new_tokens=least), ends, generator())
    lengths = [len(response) for response in out.responses]
    assert min(lengths) >= least + 1
    assert all(token not in ends for response in out.responses for token in response[:least])
    assert any(response[-1] in ends for response in out.responses)
    check_logprobs(model, PROMPTS * 4, out)


def test_min_new_tokens_must_leave_room():
    with pytest.raises(ConfigError, match=r"min_new_tokens=12 leaves no room to end within max_new_tokens=12"):
        RolloutSettings(max_new_tokens=12, min_new_tokens=12)
    with pytest.raises(ConfigError, match=r"stop=\['a', ''\] holds an empty string"):
        RolloutSettings(stop=["a", ""])


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]] * 3])
def test_a_repetition_penalty_is_that_of_transformers(prompts):
    """At a low temperature the most likely token is drawn: transformers' greedy search with the same penalty."""
    model, cold = build(), 1e-4
    out = sample(model, prompts, settings(repetition_penalty=1.7, temperature=cold), NO_END, generator())
    with torch.no_grad(), model.role("actor"):
        for prompt, response in zip(prompts, out.responses, strict=True):
            ids = torch.tensor([prompt])
            options = {"do_sample": False, "repetition_penalty": 1.7, "max_new_tokens": 12, "eos_token_id": None}
            found = model.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            assert found[0, len(prompt) :].tolist() == response
    plain = sample(model, prompts, settings(temperature=cold), NO_END, generator())
    assert plain.responses != out.responses
    warm = sample(model, prompts, settings(repetition_penalty=1.7, top_k=20), NO_END, generator())
    check_logprobs(model, prompts, warm)


def test_a_string_ends_a_response_where_it_is_complete():
    model, words = build(), tokenizer()
    stop = StopStrings(words, ["w3", "w11 w2"])
    low = list(range(32, VOCABULARY))  # the tokenizer has 32 tokens
    out = sample(model, PROMPTS * 20, settings(max_new_tokens=30), [2], generator(), never=low, stopped=stop)
    texts = words.batch_decode(out.responses)
    cut = [text for text in texts if "w3" in text or "w11 w2" in text]
    assert len(cut) > 10
    for text in texts:
        before, _, last = text.rpartition(" ")
        assert "w3" not in before
        assert "w11 w2" not in before
        assert ("w3" in last or text.endswith("<eos>") or "w11 w2" in text) or len(text.split()) == 30
    check_logprobs(model, PROMPTS * 20, out)


def test_scores_are_read_at_the_trained_end_whatever_end_was_drawn():
    """Rows that end in another end token are scored as if they ended in the first; log-probs and values do not see that."""
    model = build(train="ppo")
    responses = [[11, 12, 9], [13, 7], [14, 15, 16, 17]]  # ends are 7 and 9; the last row was cut by its length
    rows = Experience.from_lists(PROMPTS[:3], responses, 0, CPU)
    trained = Experience.from_lists(PROMPTS[:3], [[11, 12, 7], [13, 7], responses[2]], 0, CPU)
    zeros = torch.zeros(rows.response_ids.shape)
    found = score(model, rows, zeros, settings(), eos_ids=[7, 9])
    alike, plain = score(model, trained, zeros, settings()), score(model, rows, zeros, settings())
    assert torch.equal(found.scores, alike.scores)
    assert found.scores[0] != plain.scores[0]
    assert torch.equal(found.scores[1:], plain.scores[1:])
    assert torch.equal(found.ref_logprobs, plain.ref_logprobs)
    assert torch.equal(found.old_values, plain.old_values)
    assert torch.equal(found.response_ids, rows.response_ids)


def test_rows_without_a_response_or_an_end_stay_as_they_are():
    rows = Experience.from_lists([[5, 9], [5, 6]], [[], [9]], 0, CPU).sequences()
    assert ending_alike(rows, [7, 9]).input_ids.tolist() == [[5, 9, 0], [5, 6, 7]]
    assert ending_alike(rows, [9]) is rows


def test_a_sampler_of_ones_own_is_asked_for_nothing_that_it_need_not_know():
    seen = []

    def own(model, prompts, settings, eos_ids, generator):
        seen.append(list(eos_ids))
        return sample(model, prompts, settings, eos_ids, generator)

    collect_experience(build(), PROMPTS, settings(), eos_ids=[2, 3], pad_id=0, generator=generator(), sampler=own)
    assert seen == [[2, 3]]
