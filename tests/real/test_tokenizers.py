"""Every real tokenizer with its families' chat templates: where answers end, how they join prompts, what they say."""

from __future__ import annotations

import os
import random

import pytest

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.ends import find_ends
from hydra_ppo.data.text import Codec, answer_texts
from tests.real.conftest import NATIVE, loaded, with_template
from tests.real.templates import FAMILIES

SYSTEM = {"role": "system", "content": "You are brief."}
TEXTS = (
    *("Paris.", "  two spaces before", "\nnewline before", "\n\n\n", "ends in newlines\n\n", " ends in spaces  ", "a  b   c"),
    *("tab\tand\ttab", "1", "3.14159 and 1234567890", "naïve café", "你好世界。", "こんにちは 世界", "مرحبا"),
    *("😀", "👩\u200d👧 two", "'s"),
    *("def f(x):\n    return x\n", "<b>no tag</b>", "### Response:", "x"),
)
PIECES = (
    *(" ", "  ", "\n", "\n\n", "\t", "a", "B", "the", " cat", "ing", "7", "2024", ".", ",", "!", "'s", "é", "ß", "你", "好"),
    *("の", "한", "😀", "👍🏽", "\u200d", "e\u0301", "-", "=", "(", ")", "<", ">", "[", "/", "|", "\u00a0", "_", "Ω"),
)
RANDOM_TEXTS = 300 if os.environ.get("HYDRA_TEST_REAL") else 30


def codec(kind, family, **settings):
    return Codec(with_template(kind, family), DataSettings(train="unused", **settings))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def random_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randint(1, 12)))


def texts(seed):
    rng = random.Random(seed)
    return [*TEXTS, *(random_text(rng) for _ in range(RANDOM_TEXTS))]


def written(tokenizer, messages):
    """What the template writes for the last message; Mistral's forget the system message once there is an answer."""
    for shown in (messages, [message for message in messages if message["role"] != "system"]):
        before = tokenizer.apply_chat_template(shown[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(shown, tokenize=False)
        if whole.startswith(before):
            return whole[len(before) :]
    raise AssertionError(f"{whole!r} does not begin with {before!r}")


@pytest.mark.parametrize(("kind", "family"), NATIVE)
def test_answers_end_where_the_family_ends_a_turn(kind, family):
    ends = find_ends(with_template(kind, family))
    assert ends.text == FAMILIES[family].end
    assert with_template(kind, family).eos_token_id in ends.ids  # a sampled answer may end there, too


@pytest.mark.parametrize(
    ("kind", "family", "listed"),
    [
        ("llama3", "llama3", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
        ("qwen", "qwen2.5", ("<|im_end|>", "<|endoftext|>")),
        ("v1-bare", "gemma3", ("</s>", "<end_of_turn>")),
        ("v1-prepend", "phi3", ("</s>", "<|assistant|>", "<|end|>")),
    ],
)
def test_the_generation_config_of_a_family_adds_its_ends(kind, family, listed):
    """As their hub files list them; a word of the vocabulary in such a list ends nothing, and is named."""
    tokenizer = with_template(kind, family)
    ids = tokenizer.convert_tokens_to_ids(listed)
    word = tokenizer.encode("cat", add_special_tokens=False)[-1]
    ends = find_ends(tokenizer, generation_ids=[*ids, word])
    assert ends.text == FAMILIES[family].end
    assert set(ends.ids) == {*ids, tokenizer.eos_token_id}
    assert [str(word) in note for note in ends.notes] == [True]


@pytest.mark.parametrize(("kind", "family"), NATIVE)
def test_an_answer_is_what_follows_its_prompt_in_the_whole(kind, family):
    """Prompt and answer are the tokens of the joint text, cut after the first end; nothing follows it."""
    coder = codec(kind, family)
    tokenizer, turn = coder.tokenizer, coder.ends.turn
    crossings = 0
    for text in texts(0):
        if not text.strip():
            continue  # no data set's answer, and refused before it comes here
        messages = [SYSTEM, user("Say something."), assistant(text)]
        prompt = coder.prompt(messages[:-1])
        answer = coder.answer("chosen", prompt, messages[-1:])
        whole = prompt.text + written(tokenizer, messages)
        joint = tokenizer(whole, add_special_tokens=False)["input_ids"]
        start = len(prompt.ids)
        assert answer.ids[-1] == turn
        assert turn not in answer.ids[:-1]
        if not answer.crossing:
            assert list(prompt.ids) == joint[:start], repr(text)
            assert list(answer.ids) == joint[start : joint.index(turn, start) + 1], repr(text)
        else:
            crossings += 1
            joint = joint[: joint.index(turn, start - 2) + 1]
            assert tokenizer.decode([*prompt.ids, *answer.ids]) == tokenizer.decode(joint), repr(text)
        # The tokens say what the template wrote, and a reward function reads just that.
        said = whole[len(prompt.text) :].partition(coder.ends.text)[0]
        read = answer_texts(tokenizer, [prompt.ids], [answer.ids], ends=coder.ends.ids)[0]
        assert read == said, (text, tokenizer.convert_ids_to_tokens(list(answer.ids)))
    assert crossings < len(texts(0)) / 2


@pytest.mark.parametrize(("kind", "family"), NATIVE)
def test_one_begin_token(kind, family):
    coder = codec(kind, family)
    tokenizer, bos = coder.tokenizer, coder.tokenizer.bos_token_id
    rendered = coder.prompt([user("Hi")])
    assert list(rendered.ids) == tokenizer.apply_chat_template([user("Hi")], add_generation_prompt=True)["input_ids"]
    again = coder.prompt(rendered.text)  # a prompt that was rendered beforehand
    if bos is None or tokenizer.bos_token in FAMILIES[family].turns:
        assert again.ids == rendered.ids
        return
    assert rendered.ids.count(bos) == int(FAMILIES[family].writes_bos)
    assert again.ids.count(bos) == 1
    assert again.ids[0] == bos
    assert [i for i in again.ids if i != bos] == [i for i in rendered.ids if i != bos]


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in NATIVE}))
@pytest.mark.parametrize("prompt_text", ["Question: why?\nAnswer:", "\n\nHuman: Hi\n\nAssistant:", "Write on:\n", "x ="])
def test_plain_text(kind, prompt_text):
    """Without a template, too: the joint text's tokens, or the same words where a token crosses."""
    tokenizer = loaded(kind)
    coder = Codec(tokenizer, DataSettings(train="unused"))
    prompt = coder.prompt(prompt_text)
    rng = random.Random(1)
    for text in [*(t for t in TEXTS if t.strip()), *(" " + random_text(rng) + "a" for _ in range(RANDOM_TEXTS))]:
        answer = coder.answer("chosen", prompt, text)
        assert answer.ids[-1] == coder.ends.turn
        joint = tokenizer(prompt_text + text)["input_ids"]
        if not answer.crossing:
            assert [*prompt.ids, *answer.ids[:-1]] == joint, repr(text)
        read = answer_texts(tokenizer, [prompt.ids], [answer.ids], ends=coder.ends.ids)[0]
        assert read == text, (answer, tokenizer.convert_ids_to_tokens(list(answer.ids)))


@pytest.mark.parametrize(("kind", "family"), NATIVE)
def test_a_cut_prompt_keeps_system_message_and_last_header(kind, family):
    turns = [m for i in range(6) for m in (user(f"Question {i}: 你好 😀 " + "word " * 9), assistant(f"Answer {i}."))]
    messages = [SYSTEM, *turns, user("The last question, " + "long " * 30 + "at its end?")]
    coder = codec(kind, family)
    whole = coder.prompt(messages)
    header = whole.text.rpartition("at its end?")[2]
    lengths = set()
    for limit in range(len(whole.ids), 40 + len(coder.prompt([SYSTEM, user("x")]).ids), -7):
        prompt = codec(kind, family, max_prompt_tokens=limit).prompt(messages)
        assert len(prompt.ids) <= limit
        assert SYSTEM["content"] in prompt.text
        assert prompt.text.endswith("at its end?" + header)
        assert "\ufffd" not in prompt.text
        # What is left is a conversation of its own, in the very tokens that it has by itself.
        assert prompt.messages is not None
        assert prompt.ids == coder.prompt(prompt.messages).ids
        lengths.add(len(prompt.ids))
    assert len(lengths) > 5


@pytest.mark.parametrize(("kind", "family"), NATIVE)
def test_answers_are_read_back_after_any_prompt(kind, family):
    """As a rollout does: tokens in, text out, for prompts and answers of every kind."""
    coder = codec(kind, family)
    rng = random.Random(2)
    prompts, answers, expected = [], [], []
    for _ in range(RANDOM_TEXTS):
        question, text = random_text(rng) + "?", "a" + random_text(rng) + "z"
        prompt = coder.prompt([user(question)])
        answer = coder.answer("chosen", prompt, [assistant(text)])
        whole = coder.render([user(question), assistant(text)], add_generation_prompt=False)
        prompts.append(prompt.ids)
        answers.append(answer.ids)
        expected.append(whole[len(prompt.text) :].partition(coder.ends.text)[0])
    assert answer_texts(coder.tokenizer, prompts, answers, ends=coder.ends.ids) == expected
