"""Prompt and answer as one text: encoded together, cut at the boundary, decoded together; prompts that are too long."""

from __future__ import annotations

from datetime import datetime

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_ppo.data.boundaries import HUMAN
from hydra_ppo.data.rows import load_preferences, load_prompts
from hydra_ppo.data.sources import Rejected
from hydra_ppo.data.text import Codec, StopStrings, answer_texts, unknown_ids
from tests.hydra_ppo.test_data import BOS, CHATML, END, EOS, assistant, data, make_tokenizer, pair, user

CHAT = make_tokenizer("<bos> {}", CHATML)  # turns end in <end>, texts in <eos>
SYSTEM = {"role": "system", "content": "S"}


def merging() -> PreTrainedTokenizerFast:
    """Letters, and "ab" as one token: a merge that may cross from prompt to answer."""
    vocab = {c: i for i, c in enumerate(["<bos>", "<eos>", *"abc", "ab", "bc"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def words(text: str, tokenizer=CHAT) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


# Answers


def test_an_answer_ends_where_a_rollout_would_and_nothing_follows():
    row = load_preferences([pair([user("Hi")], "yes", "no")], CHAT, data()).rows[0]
    assert row.chosen_ids == (*words("yes"), END)  # neither the newline of the template nor <eos>
    text = load_preferences([pair("Q:", " yes<eos>", " no<end>\n")], CHAT, data()).rows[0]
    assert (text.chosen_ids, text.rejected_ids) == ((*words(" yes"), END), (*words(" no"), END))
    named = load_preferences([pair("Q:", " yes", " no")], CHAT, data(end_of_turn="<eos>")).rows[0]
    assert named.chosen_ids == (*words(" yes"), EOS)


def test_what_stands_after_an_end_inside_an_answer_is_never_sampled():
    row = load_preferences([pair([user("Hi")], "yes<end>and more", "no")], CHAT, data()).rows[0]
    assert row.chosen_ids == (*words("yes"), END)


def test_where_a_merge_crosses_the_boundary_the_answer_is_what_a_rollout_would_draw():
    tokenizer = merging()
    loaded = load_preferences([pair("a", "bc", "ca")], tokenizer, data())
    row = loaded.rows[0]
    # "abc" is "ab" "c", but a rollout goes on from the prompt's "a": "bc" is one token then
    assert row.prompt_ids == words("a", tokenizer)
    assert row.chosen_ids == (*words("bc", tokenizer), 1)
    assert tokenizer.decode(row.prompt_ids + row.chosen_ids[:-1]) == "abc"
    assert loaded.reasons == {"a token crosses from prompt to chosen; the answer is encoded as a rollout would draw it": 1}


def test_conversations_that_part_early_are_read_after_their_own_context():
    chosen = [user("Hi"), assistant("Yes?"), user("more"), assistant("ok")]
    loaded = load_preferences([pair(None, chosen, [user("Hi"), assistant("No.")])], CHAT, data())
    row = loaded.rows[0]
    codec = Codec(CHAT, data())
    assert row.prompt_ids == codec.prompt(chosen[:-1]).ids
    assert row.before_rejected == codec.prompt([user("Hi")]).ids
    assert (row.chosen_ids, row.rejected_ids) == ((*words("ok"), END), (*words("No."), END))
    assert sum("each last answer is read after its own" in reason for reason in loaded.reasons) == 1
    shared = load_prompts([pair(None, chosen, [user("Hi"), assistant("No.")])], CHAT, data()).rows[0]
    assert shared.text == row.rejected_prompt_text

    start = "\n\nHuman: Hi\n\nAssistant:"
    text = load_preferences([pair(None, f"{start} Yes?\n\nHuman: q\n\nAssistant: ok", f"{start} No.")], CHAT, data()).rows[0]
    assert (text.prompt_text, text.chosen_text) == (f"{start} Yes?\n\nHuman: q\n\nAssistant:", " ok")
    assert (text.rejected_prompt_text, text.rejected_text) == (start, " No.")


# Decoding


def metaspace() -> PreTrainedTokenizerFast:
    chars = ["<s>", "</s>", "<think>", "▁", *"abcdS!:"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(chars)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<think>"]
    )


def test_what_a_reward_reads_is_what_the_tokens_say():
    tokenizer = metaspace()
    prompt, whole = words("a:", tokenizer), words("a: S!", tokenizer)
    answer = [*whole[len(prompt) :], 1]
    assert answer_texts(tokenizer, [prompt], [answer]) == [" S!"]  # decoded alone, the first space would be lost
    assert tokenizer.decode(answer, skip_special_tokens=True) == "S!"


def test_special_tokens_inside_an_answer_are_shown_on_request_its_end_never():
    tokenizer = metaspace()
    prompt, answer = words("a:", tokenizer), [2, *words("bc", tokenizer)[1:], 1]
    assert answer_texts(tokenizer, [prompt], [answer]) == ["bc"]
    assert answer_texts(tokenizer, [prompt], [answer], show_special=True, ends=[1]) == ["<think>bc"]
    assert answer_texts(tokenizer, [prompt], [[]], show_special=True, ends=[1]) == [""]


def test_a_prompt_cut_inside_a_character_does_not_spoil_its_answer():
    half = make_tokenizer()("é", add_special_tokens=False).input_ids[1:]
    assert answer_texts(make_tokenizer(), [half], [words("ok")]) == ["ok"]


def test_ids_without_a_token():
    assert unknown_ids(CHAT, len(CHAT) + 3) == [len(CHAT) + i for i in range(3)]
    assert unknown_ids(CHAT, len(CHAT)) == []


# One begin token


@pytest.mark.parametrize("text", ["Q:", "<bos>Q:", "<bos><bos>Q:"])
def test_one_begin_token_whatever_the_text_brings(text):
    assert load_prompts([{"prompt": text}], CHAT, data()).rows[0].ids == (BOS, *words("Q:"))
    assert load_preferences([pair(text, " yes", " no")], CHAT, data()).rows[0].prompt_ids == (BOS, *words("Q:"))


# Prompts that are too long


def test_whole_turns_go_from_the_front_and_the_system_message_stays():
    messages = [SYSTEM, user("one"), assistant("two"), user("three")]
    codec = Codec(CHAT, data())
    rest = codec.prompt([SYSTEM, user("three")])
    limit = len(codec.prompt(messages).ids) - 1
    cut = Codec(CHAT, data(max_prompt_tokens=limit)).prompt(messages)
    assert (cut.text, cut.ids, cut.messages) == (rest.text, rest.ids, [SYSTEM, user("three")])
    assert cut.notes == (f"prompt cut to data.max_prompt_tokens={limit}",)


@pytest.mark.parametrize("content", ["abcdefgh", "éèêëàâü", "日本語の文"])
def test_the_last_message_loses_its_beginning_but_neither_its_header_nor_half_a_character(content):
    whole = Codec(CHAT, data()).prompt([SYSTEM, user(content)])
    for limit in range(len(whole.ids) - 1, len(whole.ids) - len(words(content)), -1):
        try:
            cut = Codec(CHAT, data(max_prompt_tokens=limit)).prompt([SYSTEM, user(content)])
        except Rejected:
            assert limit < len(whole.ids) - len(words(content)) + len(words(content[-1]))
            continue
        assert len(cut.ids) <= limit
        assert cut.text.startswith("<|start|>system\nS<end>\n<|start|>user\n")
        assert cut.text.endswith("<end>\n<|start|>assistant\n")
        (last,) = cut.messages[1:]
        assert last["content"]
        assert content.endswith(last["content"])


def test_a_template_that_is_too_long_by_itself_is_said():
    with pytest.raises(Rejected, match="the system message and the template alone take that much"):
        Codec(CHAT, data(max_prompt_tokens=5)).prompt([SYSTEM, user("Hi")])


def test_text_of_hh_loses_whole_turns_other_text_its_first_tokens():
    turn = f"{HUMAN} b\n\nAssistant:"
    text = f"{HUMAN} a\n\nAssistant: x{turn}"
    limit = len(words(turn)) + 4
    cut = Codec(CHAT, data(max_prompt_tokens=limit)).prompt(text)
    assert (cut.text, cut.ids) == (turn, (BOS, *words(turn)))
    assert cut.whole_text == text  # what an answer is joined to
    plain = Codec(CHAT, data(max_prompt_tokens=4)).prompt("xyéé")
    assert (plain.text, plain.ids) == ("é", (BOS, *words("é")))  # 3 bytes would be half a character and a whole one


def test_a_row_says_the_same_on_every_day_of_a_run():
    tokenizer = make_tokenizer(template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    day = datetime(2024, 2, 29, 12)
    text = Codec(tokenizer, data(), day).prompt([user("Hi")]).text
    assert text.startswith("29 Feb 2024<|start|>user")
    assert not Codec(tokenizer, data()).prompt([user("Hi")]).text.startswith("29 Feb 2024")


def test_settings_of_the_template_reach_it():
    tokenizer = make_tokenizer(template="{% if thinking is defined and not thinking %}/no{% endif %}" + CHATML)
    codec = Codec(tokenizer, data(chat_template_kwargs={"thinking": False}))
    assert codec.prompt([user("Hi")]).text.startswith("/no<|start|>")


def test_a_stop_string_that_begins_with_a_space_is_seen_at_the_first_token():
    """SentencePiece drops the space that a decoded text begins with; in an answer it stands between prompt and answer."""
    tokenizer = metaspace()
    space, b, d = (tokenizer.convert_tokens_to_ids(token) for token in ("▁", "b", "d"))
    assert tokenizer.decode([space, b]) == "b"
    assert StopStrings(tokenizer, [" b"])([[space, b], [b], [d, space, b]]) == [True, False, True]
    assert StopStrings(tokenizer, ["a"])([[space, b]]) == [False]  # which is not of the answer
