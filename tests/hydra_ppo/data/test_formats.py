"""Rows of every format come apart into prompt and answers, and bad ones are refused by kind."""

import pytest

from hydra_ppo.data.formats import template_options
from hydra_ppo.data.rows import check_source, load_preferences, load_prompts
from hydra_ppo.data.sources import Rejected
from hydra_ppo.errors import DataError
from tests.hydra_ppo.test_data import (
    CHAT,
    END,
    EOS,
    HH,
    NO_CONTINUATION,
    PLAIN,
    STRICT,
    assistant,
    data,
    ids_of,
    make_tokenizer,
    message,
    pair,
    texts,
    user,
    write,
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(pair(), ("Q:", " yes", " no"), id="explicit"),
        pytest.param(pair(chosen="Q: yes", rejected="Q: no"), ("Q:", " yes", " no"), id="prompt-repeated"),
        pytest.param(pair("Hi", "Hi there", "Go"), ("Hi", "Hi there", "Go"), id="begins-like-prompt-by-accident"),
        pytest.param(pair(None, "Q: a yes", "Q: a no"), ("Q: a", " yes", " no"), id="implicit-space"),
        pytest.param(pair(None, "Q\nyes", "Q\nyellow"), ("Q\n", "yes", "yellow"), id="implicit-newline"),
        pytest.param(pair(None, "is it yes", "is it yesterday"), ("is it", " yes", " yesterday"), id="implicit-inside-word"),
        pytest.param({"chosen": HH + " A b", "rejected": HH + " A c"}, (HH, " A b", " A c"), id="hh"),
        pytest.param(
            {"chosen": f"{HH} A\n\nHuman: B\n\nAssistant: x", "rejected": f"{HH} A\n\nHuman: B\n\nAssistant: y"},
            (f"{HH} A\n\nHuman: B\n\nAssistant:", " x", " y"),
            id="hh-two-turns",
        ),
    ],
)
def test_text_pairs(row, expected):
    loaded = load_preferences([row], PLAIN, data())
    assert [texts(row) for row in loaded.rows] == [expected]
    first = loaded.rows[0]
    assert first.prompt_ids == ids_of(expected[0])
    assert first.chosen_ids == (*ids_of(expected[1]), EOS)
    assert first.rejected_ids == (*ids_of(expected[2]), EOS)
    assert load_prompts([row], PLAIN, data()).rows[0].text == expected[0]


CHAT_TURN = "<|start|>user\nHi<end>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(pair([user("Hi")], [assistant("yes")], [assistant("no")]), id="explicit"),
        pytest.param(pair([user("Hi")], [user("Hi"), assistant("yes")], [assistant("no")]), id="prompt-repeated"),
        pytest.param(pair(None, [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")]), id="implicit"),
        pytest.param(pair("Hi", [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")]), id="ultrafeedback"),
        pytest.param(pair("Hi", [assistant("yes")], [assistant("no")]), id="text-prompt"),
        pytest.param(pair([user("Hi")], "yes", "no"), id="text-responses"),
        pytest.param(pair([user("Hi") | {"name": None}], [assistant("yes")], [assistant("no")]), id="null-keys"),
    ],
)
def test_chat_pairs(row):
    row = load_preferences([row], CHAT, data()).rows[0]
    assert texts(row) == (CHAT_TURN, "yes<end>\n", "no<end>\n")
    assert row.prompt_ids == ids_of(CHAT_TURN)  # the template is the whole text: no <bos> in front
    assert row.chosen_ids == (*ids_of("yes"), END)  # the template's EOS, once, without the newline behind it


def test_chat_response_gets_eos_where_the_template_gives_none():
    tokenizer = make_tokenizer(template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    row = load_preferences([pair([user("Hi")], "yes", "no")], tokenizer, data()).rows[0]
    assert texts(row) == ("[Hi]", "[yes]", "[no]")
    assert row.chosen_ids == (*ids_of("[yes]"), EOS)


@pytest.mark.parametrize(
    ("row", "tokenizer", "text"),
    [
        ({"prompt": "Hi"}, PLAIN, "Hi"),
        ({"prompt": "Hi", "chosen": None, "rejected": None}, PLAIN, "Hi"),
        ({"prompt": [user("Hi")]}, CHAT, CHAT_TURN),
        ({"prompt": ({"role": "user", "content": "Hi"},)}, CHAT, CHAT_TURN),
        (pair("Hi", "same", "same"), PLAIN, "Hi"),
    ],
)
def test_prompts(row, tokenizer, text):
    row = load_prompts([row], tokenizer, data()).rows[0]
    assert (row.text, row.ids) == (text, ids_of(text))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["Q"], "not an object"),
        (pair(chosen=None), "chosen is missing"),
        (pair(chosen=float("nan")), "chosen is neither text nor a list of messages"),
        (pair(chosen={"a": 1}), "chosen is neither text nor a list of messages"),
        (pair(prompt=3), "prompt is neither text nor a list of messages"),
        (pair(prompt=" \n"), "prompt is empty"),
        (pair(prompt=[]), "prompt is empty"),
        (pair(prompt=[user(" ")]), "prompt is empty"),
        (pair(rejected=[]), "rejected is empty"),
        (pair([user("Q")], [user("Q")], "no"), "one of chosen and rejected is text, the other messages"),
        (
            pair([user("Q")], [assistant("a")], [assistant("b"), user("c")]),
            "rejected does not start and end with an assistant message",
        ),
        (pair([user("Q"), assistant("A")], "yes", "no"), "prompt ends with an assistant message"),
        (pair([user("Q")], [{"role": "assistant"}], "no"), "chosen has a message without a text content"),
        (pair([user("Q")], [{"content": "a"}], "no"), "chosen has a message without a text role"),
        (pair([user("Q")], ["yes"], ["no"]), "chosen has a message that is not an object"),
        (pair(None, "yes", "no"), "prompt is missing, and chosen and rejected share none"),
        (
            pair(None, [user("Q"), assistant("a")], [user("P"), assistant("a")]),
            "prompt is missing, and chosen and rejected share none",
        ),
        (pair(chosen="\ud800"), "chosen is not valid Unicode"),
    ],
)
def test_bad_pairs(row, reason):
    for load in (lambda: load_preferences([row], PLAIN, data()), lambda: check_source([row], "preferences")):
        with pytest.raises(DataError) as excinfo:
            load()
        assert message(excinfo) == (
            f"examples: 1 of 1 rows is malformed; first at row 1: {reason}; fix it or set data.skip_bad_rows=true to drop it."
        )
    loaded = load_preferences([row, pair()], PLAIN, data(skip_bad_rows=True))
    assert (len(loaded.rows), loaded.skipped, loaded.reasons) == (1, 1, {reason: 1})
    assert check_source([row, pair()], "preferences", skip_bad_rows=True) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(chosen="  "), "chosen is empty"),
        (pair(rejected=""), "rejected is empty"),
        (pair([user("Q")], [user("Q")], [assistant("no")]), "chosen is empty"),
        (pair([user("Q")], [assistant("")], [assistant("no")]), "chosen is empty"),
        (pair(chosen=" no"), "chosen equals rejected"),
        (pair(None, "same text", "same text"), "chosen equals rejected"),
        (pair(None, [user("Q"), assistant("a")], [user("Q"), assistant("a")]), "chosen equals rejected"),
    ],
)
def test_equal_and_empty_answers_are_dropped_unless_they_shall_stop(row, reason):
    good = pair() if isinstance(row["chosen"], str) else pair([user("Q")], [assistant("yes")], [assistant("no")])
    loaded = load_preferences([row, good], CHAT, data())
    assert (len(loaded.rows), loaded.skipped, loaded.reasons) == (1, 1, {reason: 1})
    assert check_source([row, good], "preferences") == 2
    strict = data(degenerate_pairs="error")
    for load in (
        lambda: load_preferences([row, good], CHAT, strict),
        lambda: check_source([row, good], "preferences", strict=True),
    ):
        with pytest.raises(DataError, match=f"1 of 2 rows is malformed; first at row 1: {reason}"):
            load()


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        (
            STRICT,
            [{"role": "system", "content": "S"}, user("Q")],
            "the chat template refuses the messages (TemplateError: no system role)",
        ),
        (NO_CONTINUATION, [user("Q")], "the chat template does not render chosen as a continuation of its prompt"),
    ],
)
def test_templates_that_do_not_fit(template, prompt, reason):
    with pytest.raises(DataError) as excinfo:
        load_preferences([pair(prompt)], make_tokenizer(template=template), data())
    assert f"first at row 1: {reason};" in message(excinfo)


@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_chat_needs_a_template(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(), pair([user("Q")])])
    with pytest.raises(DataError) as excinfo:
        load(path, PLAIN, data(skip_bad_rows=True))
    assert message(excinfo) == (
        f"{path}: line 2 holds chat messages, but the tokenizer has no chat template; "
        "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text."
    )
    assert check_source(path, "preferences") == 2


# Messages of every kind

TOOLS = (
    "{% if tools %}<tools>{{ tools | map(attribute='name') | join(',') }}\n{% endif %}"
    "{% if mood %}<mood>{{ mood }}\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TOOL_CHAT = make_tokenizer(template=TOOLS, eos_token="<end>")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1, "b": None}}}]}


def parts(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text, "image_url": None} for text in texts]}


def test_content_in_parts_is_text():
    row = pair([parts("user", "H", "i")], [parts("assistant", "ye", "s")], [parts("assistant", "no")])
    assert load_preferences([row], CHAT, data()) == load_preferences(
        [pair([user("Hi")], [assistant("yes")], [assistant("no")])], CHAT, data()
    )


def test_a_template_that_takes_parts_alone_gets_parts():
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template=template, eos_token="<end>")
    for prompt in ([user("Hi")], [parts("user", "H", "i")]):
        row = load_preferences([pair(prompt, "yes", "no")], tokenizer, data())
        assert texts(row.rows[0]) == (CHAT_TURN, "yes<end>\n", "no<end>\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "image_url", "image_url": "x"}], "prompt has a part of type 'image_url'; only text can be read"),
        ([{"type": "text", "text": None}], "prompt has a part of a message without a text"),
        (["Hi"], "prompt has a part of a message that is not an object"),
        ([], "prompt is empty"),
        (None, "prompt has a message without a text content"),
        (3, "prompt has a message without a text content"),
    ],
)
def test_parts_that_are_not_text_are_refused(content, reason):
    row = pair([{"role": "user", "content": content}], [assistant("yes")], [assistant("no")])
    for load in (lambda: load_preferences([row], CHAT, data()), lambda: check_source([row], "preferences")):
        with pytest.raises(DataError) as excinfo:
            load()
        assert f"first at row 1: {reason};" in message(excinfo)


def test_one_message_alone_is_a_list_of_one():
    row = pair(user("Hi"), assistant("yes"), assistant("no"))
    assert texts(load_preferences([row], CHAT, data()).rows[0]) == (CHAT_TURN, "yes<end>\n", "no<end>\n")


def test_calls_of_tools_need_no_content():
    row = pair([user("1+1?")], [CALL], [assistant("3")])
    found = load_preferences([row], TOOL_CHAT, data()).rows[0]
    assert (found.chosen_text, found.rejected_text) == ('<call>sum{"a": 1}<end>\n', "3<end>\n")
    result = {"role": "tool", "content": "2"}
    later = load_preferences(
        [pair([user("1+1?")], [CALL, result, assistant("2")], [CALL, result, assistant("3")])], TOOL_CHAT, data()
    )
    assert later.rows[0].prompt_text.endswith('<call>sum{"a": 1}<end>\n<|start|>tool\n2<end>\n<|start|>assistant\n')
    assert later.rows[0].chosen_text == "2<end>\n"
    asked = load_prompts([{"prompt": [user("1+1?"), CALL, result]}], TOOL_CHAT, data()).rows[0]
    assert asked.messages[1]["content"] == ""  # readers of messages find a text in each


def test_other_roles_are_the_templates_business():
    row = pair([{"role": "developer", "content": "D"}, user("Hi")], "yes", "no")
    assert load_preferences([row], CHAT, data()).rows[0].prompt_text == "<|start|>developer\nD<end>\n" + CHAT_TURN


# What a row hands to the template


@pytest.mark.parametrize("tools", [[{"name": "sum", "default": None}, {"name": "max"}], '[{"name": "sum"}, {"name": "max"}]'])
def test_tools_and_kwargs_of_a_row_reach_the_template(tools):
    row = pair([user("Hi")], "yes", "no") | {"tools": tools, "chat_template_kwargs": {"mood": "dry", "other": None}}
    expected = "<tools>sum,max\n<mood>dry\n" + CHAT_TURN
    settings = data(chat_template_kwargs={"mood": "gay"})  # the row's own wins
    found = load_preferences([row], TOOL_CHAT, settings).rows[0]
    assert texts(found) == (expected, "yes<end>\n", "no<end>\n")
    assert load_prompts([row], TOOL_CHAT, settings).rows[0].text == expected
    assert load_preferences([pair([user("Hi")], "yes", "no")], TOOL_CHAT, settings).rows[0].prompt_text == (
        "<mood>gay\n" + CHAT_TURN
    )


def test_tools_stay_when_a_long_prompt_is_cut():
    row = {"prompt": [user("first " * 20), assistant("A"), user("Hi")], "tools": [{"name": "sum"}]}
    found = load_prompts([row], TOOL_CHAT, data(max_prompt_tokens=60)).rows[0]
    assert found.text == "<tools>sum\n" + CHAT_TURN


def test_tools_of_text_are_counted():
    loaded = load_prompts([{"prompt": "Hi", "tools": [{"name": "sum"}]}, {"prompt": "Ho", "tools": []}], TOOL_CHAT, data())
    assert loaded.reasons == {"tools of a prompt that is text, which no chat template writes, are not used": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": {"name": "sum"}}, "tools is not a list"),
        ({"tools": "sum"}, "tools is not valid JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs sets tokenize, which is not the template's"),
    ],
)
def test_what_no_template_takes_is_refused(row, reason):
    with pytest.raises(Rejected) as excinfo:
        template_options(row)
    assert excinfo.value.reason == reason
    with pytest.raises(DataError, match=f"row 1: {reason}"):
        check_source([{"prompt": [user("Hi")]} | row], "prompts")


# A column of whole conversations


@pytest.mark.parametrize(
    "messages", [[user("Hi")], [user("Hi"), assistant("yes")], [user("Hi"), assistant("yes"), assistant("and no")]]
)
def test_messages_ask_up_to_the_last_answer(messages):
    for row in ({"messages": messages}, {"messages": messages, "prompt": None}):
        assert load_prompts([row], CHAT, data()).rows[0].text == CHAT_TURN


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hi", "messages is text, not a list of messages"),
        ([assistant("yes")], "messages holds answers alone"),
        ([], "messages is empty"),
    ],
)
def test_messages_that_ask_nothing(messages, reason):
    with pytest.raises(DataError, match=f"row 1: {reason};"):
        load_prompts([{"messages": messages}], CHAT, data())


# Answers that differ in little


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(chosen=" yes", rejected="yes\n"), "chosen and rejected are the same but for spaces around them"),
        (
            pair([user("Q")], [assistant("yes")], [assistant(" yes")]),
            "chosen and rejected are the same but for spaces around them",
        ),
    ],
)
def test_spaces_around_an_answer_make_no_other_one(row, reason):
    good = pair([user("Q")], "yes", "no")
    loaded = load_preferences([row, good], CHAT, data())
    assert (len(loaded.rows), loaded.skipped, loaded.reasons) == (1, 1, {reason: 1})
    with pytest.raises(DataError, match=reason):
        load_preferences([row, good], CHAT, data(degenerate_pairs="error"))


def test_answers_that_differ_in_spaces_inside_are_used_and_counted():
    loaded = load_preferences([pair(chosen=" if x:\n  y", rejected=" if x: y")], PLAIN, data())
    assert (len(loaded.rows), loaded.reasons) == (1, {"chosen and rejected differ in spaces and line breaks alone": 1})


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_last_answers_after_a_context_of_their_own_are_dropped(empty):
    chat = pair([user("Q")], [assistant("a"), user("b"), assistant("c")], [assistant("d"), user("e"), assistant(empty)])
    text = {"chosen": f"{HH} a\n\nHuman: b\n\nAssistant: c", "rejected": f"{HH} d\n\nHuman: e\n\nAssistant:{empty}"}
    for row in (chat, text):
        loaded = load_preferences([row, pair()], CHAT, data())
        assert (len(loaded.rows), loaded.reasons) == (1, {"rejected is empty": 1})
