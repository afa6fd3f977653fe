"""The prompt that two texts share ends where a turn begins, whatever words both answers begin with."""

import pytest

from hydra_ppo.data.boundaries import find_boundary, last_turns
from hydra_ppo.data.rows import load_preferences, load_prompts
from tests.hydra_ppo.test_data import CHATML, PLAIN, data, make_tokenizer

SHARED = "The capital of France is"
HEADS = {
    "ChatML": "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n",
    "Llama 2": "<s>[INST] <<SYS>>\nShort.\n<</SYS>>\n\nCapital? [/INST]",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\nCapital?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Llama 4": "<|header_start|>user<|header_end|>\n\nCapital?<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "Gemma": "<bos><start_of_turn>user\nCapital?<end_of_turn>\n<start_of_turn>model\n",
    "Zephyr": "<|system|>\nShort.</s>\n<|user|>\nCapital?</s>\n<|assistant|>\n",
    "Phi-3": "<|user|>\nCapital?<|end|>\n<|assistant|>\n",
    "DeepSeek": "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Capital?<\uff5cAssistant\uff5c>",
    "Command R": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Capital?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "Granite": "<|start_of_role|>user<|end_of_role|>Capital?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "Kimi": "<|im_user|>user<|im_middle|>Capital?<|im_end|><|im_assistant|>assistant<|im_middle|>",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\nCapital?\n\n### Response:\n",
    "headings": "### Human: Capital?\n### Assistant:",
    "HH": "\n\nHuman: Capital?\n\nAssistant:",
    "Vicuna": "A chat between a curious user and an assistant. USER: Capital? ASSISTANT:",
    "OpenChat": "<s>GPT4 Correct User: Capital?<|end_of_turn|>GPT4 Correct Assistant:",
    "question and answer": "Question: Capital?\nAnswer:",
    "TL;DR": "SUBREDDIT: r/maps\nPOST: Which is the capital?\nTL;DR:",
    "a name nobody listed": "User: Capital?\n\nFalcon:",
    "a role nobody listed": "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>sage\n",
    "another language": "### Frage:\nHauptstadt?\n\n### Antwort:\n",
    "Windows newlines": "<|im_start|>user\r\nCapital?<|im_end|>\r\n<|im_start|>assistant\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_prompt_ends_where_the_answer_is_asked_for(name):
    head = HEADS[name]
    words = (" " if head.endswith((":", "[/INST]")) else "") + SHARED
    row = {"chosen": head + words + " Paris.", "rejected": head + words + " Rome."}
    loaded = load_preferences([row], PLAIN, data())
    found = loaded.rows[0]
    assert found.prompt_text == head
    assert (found.chosen_text, found.rejected_text) == (words + " Paris.", words + " Rome.")
    assert [note for note in loaded.reasons if note.startswith("the prompt ends at the last")], loaded.reasons
    assert load_prompts([row], PLAIN, data()).rows[0].text == head


@pytest.mark.parametrize(
    "answer",
    ["<think>\nThe user", "Answer: it is", "# Title\n\nIt", "Sure:\n\nSteps:\n1. It", "<b>bold</b> and", "[1] a source [2"],
)
def test_marks_inside_the_answers_are_none_of_the_turn(answer):
    for name in ("ChatML", "Llama 3", "Gemma", "Zephyr", "Llama 2", "Alpaca", "HH"):
        shared = HEADS[name] + answer
        assert shared[: find_boundary(shared).end] == HEADS[name], name


def test_the_templates_own_header_wins_over_guesses():
    template = CHATML.replace("<|start|>assistant", "It is said by the sage, ")
    tokenizer = make_tokenizer(template=template)
    head = "<|start|>user\nAnswer: what?<end>\nIt is said by the sage, \n"
    row = {"chosen": head + SHARED + " Paris.", "rejected": head + SHARED + " Rome."}
    loaded = load_preferences([row], tokenizer, data())
    assert loaded.rows[0].prompt_text == head
    assert loaded.reasons == {"the prompt ends where the chat template begins an answer": 1}


@pytest.mark.parametrize(
    ("shared", "prompt", "where"),
    [
        ("Q: a b is", "Q: a b", "word"),  # one label alone is the question's
        ("A: b is", "A: b", "word"),
        ("What is it? It", "What is it?", "word"),
        ("What is it?\nIt is", "What is it?\n", "line"),
        ("\n It is", "\n It", "word"),
        ("Note: x\nhttp://a.b is", "Note: x\n", "line"),
        ("word", "", "word"),
    ],
)
def test_without_a_turn_no_word_is_cut_and_it_is_said(shared, prompt, where):
    found = find_boundary(shared)
    assert shared[: found.end] == prompt
    assert found.note == f"no turn begins in what chosen and rejected share; the prompt ends at its last whole {where}"


def test_later_turns_of_both_answers_are_context():
    prompt = HEADS["ChatML"]
    turn = "<|im_end|>\n<|im_start|>user\nAnd %s?<|im_end|>\n<|im_start|>assistant\n"
    row = {"chosen": prompt + "Paris" + turn % "Italy" + "Rome", "rejected": prompt + "Lyon" + turn % "Spain" + "Madrid"}
    loaded = load_preferences([row], PLAIN, data(max_prompt_tokens=400)).rows[0]
    assert (loaded.chosen_text, loaded.rejected_text) == ("Rome", "Madrid")
    assert loaded.prompt_text == prompt + "Paris" + turn % "Italy"
    assert loaded.rejected_prompt_text == prompt + "Lyon" + turn % "Spain"


@pytest.mark.parametrize("name", ["ChatML", "Llama 2", "Alpaca"])
def test_an_answer_that_runs_on_by_itself_is_one_answer(name):
    prompt = HEADS[name]
    assert last_turns(prompt, ["Paris", "Lyon" + prompt + "Rome"]) == [0, 0]
    both = last_turns(prompt, ["Paris" + prompt + "Rome", "Lyon" + prompt + "Rome"])
    assert both == [len("Paris" + prompt), len("Lyon" + prompt)]


def test_long_texts_of_one_kind_are_searched_once_through():
    for text in ("A" * 300_000, "<" * 300_000, "A " * 150_000, "#" * 300_000, "[" * 300_000, "\n" * 300_000, "<|a" * 100_000):
        assert 0 <= find_boundary(text).end <= len(text)
