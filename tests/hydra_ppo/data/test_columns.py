"""Columns of other names, and rows that hold lists of responses, become pairs of prompt, chosen and rejected."""

import pytest

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.rows import check_source, load_preferences, load_prompts
from hydra_ppo.errors import ConfigError, DataError
from tests.hydra_ppo.test_data import CHAT, PLAIN, assistant, data, message, pair, texts, user, write

STACK = {"qid": 7, "question": "Q:", "response_j": " yes", "response_k": " no"}
NAMES = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}


def found(rows, tokenizer=PLAIN, **settings):
    return load_preferences(rows, tokenizer, data(**settings))


def refused(rows, load=load_preferences, **settings):
    with pytest.raises(DataError) as excinfo:
        load(rows, PLAIN, data(**settings))
    return message(excinfo)


# Names


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_columns_of_ones_own(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("qid,question,response_j,response_k\n7,Q:, yes, no\n")
    else:
        write(path, [STACK])
    assert [texts(row) for row in found(str(path), columns=NAMES).rows] == [("Q:", " yes", " no")]
    prompt = load_prompts(str(path), PLAIN, data(columns=NAMES)).rows[0]
    assert (prompt.text, prompt.columns) == ("Q:", {"qid": "7" if suffix == ".csv" else 7})


def test_a_path_leads_into_lists_and_objects():
    row = {
        "instruction": "Q:",
        "completions": [{"response": " a", "score": {"overall": 1}}, {"response": " b", "score": {"overall": 2}}],
    }
    names = {"prompt": "instruction", "responses": "completions.response", "ratings": "completions.score.overall"}
    assert [texts(row) for row in found([row], columns=names, format="rated").rows] == [("Q:", " b", " a")]
    whole = {"prompt": "Q:", "best": {"text": " yes"}, "a.b": " no"}  # a name with a dot of its own
    assert texts(found([whole], columns={"chosen": "best.text", "rejected": "a.b"}).rows[0]) == ("Q:", " yes", " no")


def test_rows_under_our_names_need_no_renaming():
    assert len(found([STACK, pair()], columns=NAMES).rows) == 2


def test_a_column_that_no_row_has_names_those_that_are_there():
    there = "the columns are prompt, response_j, response_k"
    rows = [{"prompt": "Q:", "response_j": " yes", "response_k": " no"}] * 2
    say = "say with data.columns which of them is chosen, or with data.format that rows hold lists of responses"
    assert refused(rows) == (
        f"examples: 2 of 2 rows are malformed; first at row 1: chosen is missing; {there}: {say}; "
        "fix them or set data.skip_bad_rows=true to drop them."
    )
    assert f"(2 x chosen is missing); {there}: say with data.columns" in refused(rows, skip_bad_rows=True)
    # where another row has it, the row is at fault and not the name
    assert refused([{"prompt": "Q", "rejected": "no"}, pair()]) == (
        "examples: 1 of 2 rows is malformed; first at row 1: chosen is missing; "
        "fix it or set data.skip_bad_rows=true to drop it."
    )


def test_rows_of_none_of_our_columns():
    assert refused([STACK], load_prompts) == (
        "examples: has none of the columns prompt, chosen, rejected, messages; the columns are qid, question, response_j, "
        "response_k: say with data.columns which is which, for example {prompt: qid}."
    )
    assert refused([STACK]).startswith("examples: has none of the columns prompt, chosen, rejected; the columns are qid, ")
    assert refused([{f"c{i}": 1 for i in range(50)} | {"prompt": "Q"}]).count(", c") == 19  # and not all of a wide table


def test_a_name_that_no_row_has():
    for load in (load_preferences, load_prompts):
        assert refused([STACK], load, columns=NAMES | {"tools": "toolz"}) == (
            "examples: data.columns={tools: toolz} names a column that no row has; "
            "the columns are qid, question, response_j, response_k."
        )
    prompts = [{"question": "Q:"}]
    assert load_prompts(prompts, PLAIN, data(columns=NAMES)).rows[0].text == "Q:"  # prompts need no answers


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"columns": {"promt": "a"}},
            "columns={'promt': 'a'} has the key 'promt', which is no column that is read; use prompt, ",
        ),
        ({"columns": {"prompt": "a", "chosen": "a"}}, "takes one column twice; give each name one column."),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt=0 must be greater than 0"),
        ({"chat_template_kwargs": {"tokenize": True}}, "sets 'tokenize', which is not the template's"),
    ],
)
def test_settings_that_cannot_be(settings, error):
    with pytest.raises(ConfigError) as excinfo:
        DataSettings(train="unused", **settings)
    assert error in str(excinfo.value)


# Lists of responses


def test_of_a_ranked_list_every_two_are_a_pair_the_furthest_apart_first():
    row = {"prompt": "Q:", "responses": [" a", " b", " c"]}
    loaded = found([row], format="ranked")
    assert [(r.chosen_text, r.rejected_text) for r in loaded.rows] == [(" a", " c"), (" a", " b"), (" b", " c")]
    assert (loaded.read, loaded.skipped, loaded.reasons) == (1, 0, {})
    best = found([row], format="ranked", pairs_per_prompt=1)
    assert [(r.chosen_text, r.rejected_text) for r in best.rows] == [(" a", " c")]


@pytest.mark.parametrize("ratings", [[3, 1, 3, 2.5], ["3", "1.0", " 3 ", "2.5"]])
def test_of_a_rated_list_the_better_one_is_chosen_and_ties_are_dropped(ratings):
    row = {"prompt": "Q:", "responses": [" a", " b", " c", " d"], "ratings": ratings}
    loaded = found([row], format="rated")
    pairs = [(r.chosen_text, r.rejected_text) for r in loaded.rows]
    assert pairs == [(" a", " b"), (" c", " b"), (" d", " b"), (" a", " d"), (" c", " d")]
    assert (loaded.skipped, loaded.reasons) == (1, {"both responses have the same rating": 1})


@pytest.mark.parametrize("unrated", [None, "N/A", "", float("nan")])
def test_responses_that_nobody_rated_are_left_out(unrated):
    row = {"prompt": "Q:", "responses": [" a", " b", " c"], "ratings": [1, unrated, 2]}
    loaded = found([row], format="rated")
    assert [(r.chosen_text, r.rejected_text) for r in loaded.rows] == [(" c", " a")]
    assert (loaded.skipped, loaded.reasons) == (2, {"one of the two responses has no rating": 2})  # of three pairs


def test_lists_of_messages():
    row = {"prompt": [user("Hi")], "responses": [[assistant("yes")], assistant("no")]}
    loaded = found([row], CHAT, format="ranked")
    assert texts(loaded.rows[0])[1:] == ("yes<end>\n", "no<end>\n")


def test_what_is_wrong_with_one_pair_of_a_list_drops_that_pair():
    loaded = found(
        [{"prompt": "Q:", "responses": [" a", " a", " "]}, {"prompt": "Q:", "responses": [" a", " b"]}], format="ranked"
    )
    assert [(r.chosen_text, r.rejected_text) for r in loaded.rows] == [(" a", " b")]
    assert loaded.reasons == {"rejected is empty": 2, "chosen equals rejected": 1}
    assert found(
        [{"prompt": "Q:", "responses": [" a"]}, {"prompt": "Q:", "responses": [" a", " b"]}], format="ranked"
    ).reasons == {"fewer than two responses to compare": 1}


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({"prompt": "Q:", "responses": "a"}, "ranked", "responses is not a list"),
        ({"prompt": "Q:", "responses": None}, "ranked", "responses is missing"),
        ({"prompt": None, "responses": ["a", "b"]}, "ranked", "prompt is missing"),
        ({"prompt": "Q:", "responses": ["a", 3]}, "ranked", "rejected is neither text nor a list of messages"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": [1]}, "rated", "responses and ratings are not equally many"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": None}, "rated", "ratings is missing"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": [1, "good"]}, "rated", "a rating is not a number"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": [1, True]}, "rated", "a rating is not a number"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": [1, float("inf")]}, "rated", "a rating is not a number"),
        ({"prompt": "Q:", "responses": ["a", "b"], "ratings": [1, "9" * 400]}, "rated", "a rating is not a number"),
    ],
)
def test_bad_lists(row, form, reason):
    assert f"first at row 1: {reason};" in refused([row], format=form)


def test_lists_where_pairs_are_asked_for_and_the_other_way_round():
    assert "the columns are prompt, responses: say with data.columns which of them is chosen, or with data.format" in refused(
        [{"prompt": "Q:", "responses": ["a", "b"]}]
    )
    assert "responses is missing; the columns are prompt, chosen, rejected: say with data.columns" in refused(
        [pair()], format="ranked"
    )


def test_lists_serve_as_prompts_and_are_checked_without_a_tokenizer():
    rows = [{"prompt": "Q:", "responses": [" a", " b", " c"]}]
    prompt = load_prompts(rows, PLAIN, data(format="ranked")).rows[0]
    assert (prompt.text, prompt.columns) == ("Q:", {"responses": [" a", " b", " c"]})
    assert check_source(rows, "prompts") == 1


# Margins


def margins(rows, **settings):
    return [row.margin for row in load_preferences(rows, PLAIN, data(**settings), margins=True).rows]


def test_margins_are_read_where_they_are_asked_for():
    rows = [pair() | {"margin": 0.5}, pair(prompt="Q2:") | {"margin": "2"}, pair(prompt="Q3:") | {"margin": 0}]
    assert margins(rows) == [0.5, 2.0, 0.0]
    assert [row.margin for row in load_preferences(rows, PLAIN, data()).rows] == [None] * 3


def test_margins_of_another_name_and_of_ratings():
    assert margins([pair() | {"gap": {"score": 3}}], columns={"margin": "gap.score"}) == [3.0]
    rated = {"prompt": "Q:", "responses": [" a", " b", " c"], "ratings": [1, "4.5", 2], "margin": 9}
    assert margins([rated], format="rated") == [3.5, 2.5, 1.0]  # 4.5 - 1, 4.5 - 2, 2 - 1


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({}, "margin is missing"),
        ({"margin": None}, "margin is missing"),
        ({"margin": "n/a"}, "margin is missing"),
        ({"margin": "much"}, "margin is not a number"),
        ({"margin": True}, "margin is not a number"),
        ({"margin": -1}, "margin is negative"),
    ],
)
def test_rows_without_a_margin_are_malformed(value, line):
    rows = [pair() | {"margin": 1}, pair(prompt="Q2:") | value]
    with pytest.raises(DataError, match=f"1 of 2 rows is malformed; first at row 2: {line}"):
        margins(rows)
    assert margins(rows, skip_bad_rows=True) == [1.0]
    assert len(load_preferences(rows, PLAIN, data()).rows) == 2  # nobody asked


def test_ranks_are_no_margins():
    with pytest.raises(DataError, match="margin is missing"):
        margins([{"prompt": "Q:", "responses": [" a", " b"]}], format="ranked")


def test_a_digest_of_rows_tells_margins_apart_and_leaves_rows_without_alone():
    from dataclasses import replace

    from hydra_ppo.model.fingerprint import rows_digest

    (row,) = load_preferences([pair() | {"margin": 1}], PLAIN, data(), margins=True).rows
    bare = replace(row, margin=None)
    assert "margin" not in repr(bare)
    assert len({rows_digest([row]), rows_digest([bare]), rows_digest([replace(row, margin=2.0)])}) == 3
