"""One number per response, and nothing that only looks like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ppo.errors import NonFiniteError, RewardError

LARGEST = torch.finfo(torch.float32).max
"""Scores are tensors of fp32 later on."""

_TEXT = (str, bytes, bytearray)
_UNORDERED = (set, frozenset, Mapping)


@dataclass(frozen=True)
class Judgement:
    """What a source says, with what is only to be seen beside it.

    Attributes:
        values: one number per response.
        beside: more such numbers by name, which are logged and are no part of the score.
    """

    values: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


def checked_numbers(values: Any, count: int, name: str, where: str) -> list[float]:
    """Return what a source gave as floats, one for each of `count` responses.

    Args:
        values: a list, a tuple, an array or tensor of as many elements, or what else has a length and an order.
        name: of the source, for errors.
        where: step and phase, for errors.

    Raises:
        RewardError: where it is anything else; text, which is gone through letter by letter, sets, which have no order, and
            generators, which may have no end.
        NonFiniteError: where a number is NaN or infinite.
    """
    rule = "it must return one number per response"
    if callable(getattr(values, "tolist", None)):  # tensors, arrays, columns of a table
        values = values.reshape(-1).tolist() if hasattr(values, "reshape") else values.tolist()
    in_order = hasattr(values, "__len__") and hasattr(values, "__getitem__")  # a generator may never end
    if isinstance(values, (*_TEXT, *_UNORDERED)) or not in_order:
        raise RewardError(f"{where}: {name} returned {getattr(values, 'kind', type(values).__name__)}; {rule}, in a list.")
    given: Sequence[Any] = list(values)
    numbers = [_number(value) for value in given]
    bad = next((row for row, number in enumerate(numbers) if number is None), None)
    if bad is not None:
        raise RewardError(
            f"{where}: {name} returned {type(values).__name__}; {rule}, and response {bad} got {_shown(given[bad])}."
        )
    found = [number for number in numbers if number is not None]
    if len(found) != count:
        raise RewardError(f"{where}: {name} returned {len(found)} numbers for {count} responses; it must return one for each.")
    for row, number in enumerate(found):
        if not abs(number) <= LARGEST:
            raise NonFiniteError(
                f"{where}: reward of {name} is {number} for response {row}; look at that response in samples.jsonl or "
                "lower the learning rate."
            )
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, _TEXT):  # float("12") is a number, "12" is none
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."
