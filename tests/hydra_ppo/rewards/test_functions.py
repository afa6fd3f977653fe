"""Reward functions are given what their parameters name, may be async, and may name parts."""

from __future__ import annotations

import array
import asyncio
import collections
import functools
import itertools
import math
import time
from decimal import Decimal

import numpy
import pytest
import torch

from hydra_ppo.config.settings import RewardSettings, RewardSource
from hydra_ppo.errors import ConfigError, NonFiniteError, RewardError
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import Scorer

HERE = "tests.hydra_ppo.rewards.test_functions"
CPU = torch.device("cpu")
WHERE = "step=7 phase=score"
GIVEN: dict[str, object] = {}
"""What the function of a test was given, or returns."""


def responses(columns=({"answer": "4", "id": 1}, {"answer": "9"})) -> Responses:
    return Responses(
        prompts=["<user>2 + 2?", "3 * 3?"],
        texts=["4", "10"],
        conversations=[[{"role": "user", "content": "2 + 2?"}], None],
        columns=columns,
        ended=[True, False],
        queries=["<user>2 + 2?4<end>", "3 * 3?10"],
    )


def scorer(name: str, **settings) -> Scorer:
    return Scorer(RewardSettings(isolation="thread", sources=[RewardSource("function", f"{HERE}:{name}")], **settings), CPU)


def score(name: str, given: Responses | None = None, **settings):
    return scorer(name, **settings).score([], given or responses(), WHERE)


def noted(**values) -> list[float]:
    GIVEN.clear()
    GIVEN.update(values)
    return [0.0, 0.0]


# -- what a function is given --------------------------------------------------------------------------------------------


def any_names(a, b):
    return noted(a=a, b=b)


def gold(prompts, responses, answer):
    return [float(text == right) for text, right in zip(responses, answer, strict=True)]


def gold_by_name(responses, answer):
    return gold(None, responses, answer)


def everything(*, ended, columns, messages, responses, prompts, id):
    return noted(ended=ended, columns=columns, messages=messages, responses=responses, prompts=prompts, id=id)


def messages_alone(messages):
    return noted(messages=messages)


def with_rest(prompts, responses, **rest):
    return noted(prompts=prompts, **rest)


def rest_alone(**rest):
    return noted(**rest)


def stars(*both):
    return noted(both=both)


def with_default(prompts, responses, scale=2.0, answer=None):
    return noted(scale=scale, answer=answer)


def changes(prompts, responses, messages, columns):
    messages[0].append("more")
    messages[0][0]["content"] = "other"
    columns[0]["answer"] = "other"
    responses.clear()
    return [0.0, 0.0]


class _Judge:
    def __call__(self, prompts, responses, answer):
        return gold(prompts, responses, answer)


judge = _Judge()
partial = functools.partial(gold)
MESSAGES = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], None]


def test_two_positional_parameters_are_prompts_and_responses_whatever_their_names():
    score("any_names")
    assert GIVEN == {"a": ["<user>2 + 2?", "3 * 3?"], "b": ["4", "10"]}
    score("stars")
    assert GIVEN == {"both": (["<user>2 + 2?", "3 * 3?"], ["4", "10"])}


@pytest.mark.parametrize("name", ["gold", "gold_by_name", "judge", "partial"])
def test_a_gold_answer_by_the_name_of_its_column(name):
    assert score(name).total == [1.0, 0.0]


def test_every_name():
    score("everything")
    assert GIVEN == {
        "prompts": ["<user>2 + 2?", "3 * 3?"],
        "responses": ["4", "10"],
        "messages": MESSAGES,
        "columns": [{"answer": "4", "id": 1}, {"answer": "9"}],
        "ended": [True, False],
        "id": [1, None],
    }
    score("messages_alone")
    assert GIVEN == {"messages": MESSAGES}


def test_all_that_nobody_named_goes_to_the_rest():
    rest = {"messages": MESSAGES, "columns": [{"answer": "4", "id": 1}, {"answer": "9"}], "ended": [True, False]}
    rest |= {"answer": ["4", "9"], "id": [1, None]}
    score("with_rest")
    expected = {"prompts": ["<user>2 + 2?", "3 * 3?"]} | rest
    assert expected == GIVEN
    score("rest_alone")
    expected |= {"responses": ["4", "10"]}
    assert expected == GIVEN


def test_a_default_stands_where_there_is_no_such_column():
    score("with_default")
    assert GIVEN == {"scale": 2.0, "answer": ["4", "9"]}


def test_what_a_function_does_to_its_arguments_stays_with_it():
    given = responses()
    score("changes", given)
    assert given == responses()


def test_a_parameter_that_names_nothing_is_refused_before_anything_is_sampled():
    found = scorer("gold")
    found.check([{"answer": "4"}, {}])
    message = r"takes 'answer', which is none of prompts, responses, messages, columns, ended, and the data {}; rename"
    with pytest.raises(ConfigError, match=message.format("has the columns id, solution")):
        scorer("gold").check([{"solution": "4"}, {"id": 1}])
    with pytest.raises(ConfigError, match=message.format("has no other columns")):
        scorer("gold").check([{}])
    with pytest.raises(ConfigError, match=f"{WHERE}: reward target=.*{message.format('has no other columns')}"):
        score("gold", Responses.of_text(["a", "b"], ["c", "d"]))


def test_a_column_that_this_batch_lacks_is_none():
    found = scorer("gold")
    found.check([{"answer": "4"}])
    assert found.score([], responses(({}, {})), WHERE).total == [0.0, 0.0]


def answer_first(answer, responses):
    return [0.0, 0.0]


def answer_second(prompts, answer):
    return [0.0, 0.0]


@pytest.mark.parametrize(("name", "meaning"), [("answer_first", "prompts"), ("answer_second", "responses")])
def test_a_parameter_that_could_be_two_things_is_refused(name, meaning):
    with pytest.raises(ConfigError, match=f"takes 'answer' as its {meaning}, by position, and the rows have a column of that"):
        scorer(name).check([{"answer": "4"}])
    scorer(name).check([{"solution": "4"}])


def hidden(prompts, responses, answer, /):
    return [0.0, 0.0]


def test_a_third_parameter_by_position_alone_is_refused():
    with pytest.raises(ConfigError, match="takes 'answer' by position alone; let it be given by name"):
        scorer("hidden")


# -- what it returns -----------------------------------------------------------------------------------------------------


def returned(prompts, responses):
    return GIVEN["value"]


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5],
        (1, 0.5),
        numpy.array([1, 0.5], dtype=numpy.float32),
        numpy.array([[1], [0.5]]),
        torch.tensor([1, 0.5], requires_grad=True),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [numpy.float32(1), torch.tensor(0.5)],
        [True, Decimal("0.5")],
        collections.deque([1, 0.5]),
        array.array("d", [1, 0.5]),
    ],
)
def test_numbers_in_any_form(value):
    GIVEN["value"] = value
    assert score("returned").total == [1.0, 0.5]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("12", "returned str; it must return one number per response"),
        (b"12", "returned bytes; it must"),
        ({1.0, 2.0}, "returned set; it must"),
        (frozenset({1.0, 2.0}), "returned frozenset; it must"),
        (1.0, "returned float; it must"),
        ((float(x) for x in (1, 0.5)), "returned generator; it must return one number per response, in a list"),
        (itertools.repeat(1.0), "returned repeat; it must"),
        ({1: 1.0, 0.5: 0.5}.values(), "returned dict_values; it must"),
        (["1", "2"], "returned list; it must return one number per response, and response 0 got '1'"),
        ([1.0, None], "and response 1 got None"),
        ([[1.0], [2.0]], r"and response 0 got \[1.0\]"),
        ([1.0, {"a": 2.0}], "and response 1 got {'a': 2.0}"),
        ([1.0, 10**400], r"and response 1 got 10+\.\.\."),
        ([1.0, 1j], "and response 1 got 1j"),
        ([1.0, torch.zeros(2)], r"and response 1 got tensor\("),
        (numpy.zeros((2, 2)), "returned 4 numbers for 2 responses"),
        ([], "returned 0 numbers for 2 responses"),
        ({}, r"returned a dict with the keys \[\]; it must name parts"),
        ({0: [1.0, 2.0]}, r"returned a dict with the keys \['0'\]; it must name parts"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "part 'b', returned 1 numbers for 2 responses"),
        ({"a": 1.0}, "part 'a', returned float; it must return one number per response"),
        ({"a": {"b": [1.0, 2.0]}}, "part 'a', returned dict; it must"),
    ],
)
def test_what_only_looks_like_numbers_is_refused(value, message):
    GIVEN["value"] = value
    with pytest.raises(RewardError, match=message):
        score("returned")


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e39])
def test_numbers_that_no_score_can_be(value):
    GIVEN["value"] = {"a": [0.0, 0.0], "b": [0.0, value]}
    with pytest.raises(NonFiniteError, match=r"reward of function .*, part 'b', is .* for response 1"):
        score("returned")


def test_parts_are_summed_and_kept_apart():
    GIVEN["value"] = {"format": [1.0, 0.0], "right": torch.tensor([2.0, -0.5])}
    source = RewardSource("function", f"{HERE}:returned", 3.0)
    found = Scorer(RewardSettings(isolation="thread", sources=[source]), CPU).score([], responses(), WHERE)
    assert found.total == [9.0, -1.5]  # 3 * (1 + 2), 3 * (0 - 0.5)
    assert found.parts == {"returned": [3.0, -0.5], "returned/format": [1.0, 0.0], "returned/right": [2.0, -0.5]}
    assert found.rows()[1] == {"returned": -0.5, "returned/format": 0.0, "returned/right": -0.5}


# -- async ---------------------------------------------------------------------------------------------------------------


async def waits(prompts, responses, answer):
    async def one(text, right):
        await asyncio.sleep(0.001)
        return float(text == right)

    return await asyncio.gather(*(one(*pair) for pair in zip(responses, answer, strict=True)))


async def remembers_its_loop(prompts, responses):
    GIVEN.setdefault("loops", []).append(asyncio.get_running_loop())
    return {"a": [1.0, 2.0]}


async def fails(prompts, responses):
    raise KeyError("gone")


async def hangs(prompts, responses):
    await asyncio.sleep(3600)


async def hangs_in_a_call(prompts, responses):
    time.sleep(3600)


def test_an_async_function_is_awaited():
    assert score("waits").total == [1.0, 0.0]


def test_clients_that_belong_to_a_loop_live_on():
    GIVEN.clear()
    found = scorer("remembers_its_loop")
    for _ in range(2):
        assert found.score([], responses(), WHERE).parts == {
            "remembers_its_loop": [1.0, 2.0],
            "remembers_its_loop/a": [1.0, 2.0],
        }
    first, second = GIVEN["loops"]
    assert first is second


def test_an_async_function_that_fails_is_named():
    with pytest.raises(
        RewardError,
        match=f"{WHERE}: function .*:fails raised KeyError: 'gone' .*, in fails.; mend the function",
    ):
        score("fails")


@pytest.mark.parametrize("name", ["hangs", "hangs_in_a_call"])
def test_an_async_function_keeps_the_time_limit(name):
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"took over reward.time_limit=0.2 s; mend the function or raise the limit"):
        score(name, time_limit=0.2)
    assert time.monotonic() - begun < 10
    assert score("waits", time_limit=10.0).total == [1.0, 0.0]


def test_an_async_function_inside_another_loop():
    """As in a notebook."""

    async def cell():
        return score("waits", time_limit=None).total

    assert asyncio.run(cell()) == [1.0, 0.0]
