"""Rows as they come, under names and in forms of their own: made to rows of prompt, chosen and rejected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from hydra_ppo.data.sources import Rejected

Kind = Literal["preferences", "prompts"]

_READ: Mapping[Kind, tuple[str, ...]] = {
    "preferences": ("prompt", "chosen", "rejected", "responses", "ratings", "margin", "tools", "chat_template_kwargs"),
    "prompts": ("prompt", "messages", "tools", "chat_template_kwargs"),
}
_NEEDED: Mapping[Kind, tuple[str, ...]] = {
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt", "chosen", "rejected", "messages"),
}
_OF_LISTS = ("chosen", "rejected", "responses", "ratings", "margin")
"""Columns that the pairs of a list have of their own, or not at all."""
_SHOWN = 20
_UNRATED = ("", "n/a", "na", "nan", "none", "null")
"""What stands, in any case, for a rating that nobody gave."""


class Columns:
    """Gives columns the names of data.columns, and remembers which there were.

    Args:
        names: ours to theirs, data.columns; theirs may be a path, `completions.score`, into mappings and lists of them. A row
            that lacks theirs and has ours is taken as it is, so that data of both kinds go through one setting.
        kind: what rows are read as; names that are not read then need not be there.
    """

    def __init__(self, names: Mapping[str, str], kind: Kind) -> None:
        self._names = names
        self._kind: Kind = kind
        self._found: dict[str, None] = {}
        self._used: set[str] = set()

    def rename(self, row: Any) -> Any:
        """Return a row under our names; what is not an object stays as it is."""
        if not isinstance(row, Mapping):
            return row
        for name in row:
            if len(self._found) <= _SHOWN:
                self._found.setdefault(str(name))
        if not self._names:
            return row
        found = {}
        for ours, theirs in self._names.items():
            there, value = _follow(row, theirs)
            if there:
                found[ours] = value
            if there or ours in row:
                self._used.add(ours)
        moved = {*found, *(self._names[ours] for ours in found)}
        return {name: value for name, value in row.items() if name not in moved} | found

    def unused(self) -> str | None:
        """Return what is wrong with data.columns: a name that no row has; None where there is none, or no row at all."""
        missing = [ours for ours in self._names if ours in _READ[self._kind] and ours not in self._used]
        if not missing or not self._found:
            return None
        ours, theirs = missing[0], self._names[missing[0]]
        return f"data.columns={{{ours}: {theirs}}} names a column that no row has; {self._there()}."

    def hint(self, missing: str) -> str:
        """Return what there is instead of a column that no row has, as the end of a sentence; empty where one has it."""
        if not self._found or missing in self._found or missing in self._used:
            return ""
        lists = "" if self._kind == "prompts" else ", or with data.format that rows hold lists of responses"
        return f"; {self._there()}: say with data.columns which of them is {missing}{lists}"

    def nothing(self) -> str | None:
        """Say that no row has any column of ours, and what there is; None where one has."""
        needed = _NEEDED[self._kind]
        if not self._found or self._used or len(self._found) > _SHOWN or self._found.keys() & {*needed, "responses"}:
            return None
        example = next(iter(self._found))
        return (
            f"has none of the columns {', '.join(needed)}; {self._there()}: "
            f"say with data.columns which is which, for example {{prompt: {example}}}."
        )

    def _there(self) -> str:
        names = list(self._found)
        return f"the columns are {', '.join(names[:_SHOWN])}" + (", ..." if len(names) > _SHOWN else "")


def pair_rows(row: Any, form: Literal["pairs", "ranked", "rated"], limit: int | None) -> Iterator[Any]:
    """Yield rows of prompt, chosen and rejected, or a Rejected for each that cannot be one.

    Of a list of responses every two make a pair, those that lie furthest apart first: by rating, or by rank. Ratings leave a
    pair their difference as its `margin`.

    Args:
        form: data.format.
        limit: most pairs of one row, data.pairs_per_prompt.
    """
    if form == "pairs" or not isinstance(row, Mapping):
        yield row
        return
    try:
        responses = _list(row, "responses")
        ratings = [-float(rank) for rank in range(len(responses))] if form == "ranked" else _ratings(row, len(responses))
    except Rejected as rejected:
        yield rejected
        return
    rest = {name: value for name, value in row.items() if name not in _OF_LISTS}
    if rest.get("prompt") is None:
        yield Rejected("prompt is missing", missing="prompt")
        return
    if len(responses) < 2:
        yield Rejected("fewer than two responses to compare", malformed=False)
    rated = [(rating, response) for rating, response in zip(ratings, responses, strict=True) if rating is not None]
    for _ in range(math.comb(len(responses), 2) - math.comb(len(rated), 2)):
        yield Rejected("one of the two responses has no rating", malformed=False)
    pairs = [(abs(a - b), i, j) for i, (a, _) in enumerate(rated) for j, (b, _) in enumerate(rated[i + 1 :], i + 1)]
    for gap, i, j in sorted(pairs, key=lambda pair: -pair[0])[:limit]:
        if gap == 0:
            yield Rejected("both responses have the same rating", malformed=False)
            continue
        better, worse = (i, j) if rated[i][0] > rated[j][0] else (j, i)
        margin = {"margin": gap} if form == "rated" else {}
        yield rest | {"chosen": rated[better][1], "rejected": rated[worse][1]} | margin


def margin_of(row: Any) -> float:
    """Return how much better a pair's chosen answer is said to be, also where that is written as text.

    Raises:
        Rejected: where nobody says so, or what is said is no number of 0 or more.
    """
    value = row.get("margin") if isinstance(row, Mapping) else None
    try:
        margin = _rating(value)
    except Rejected:
        raise Rejected("margin is not a number") from None
    if margin is None:
        raise Rejected("margin is missing", missing="margin")
    if margin < 0:
        raise Rejected("margin is negative")
    return margin


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        raise Rejected(f"{name} is missing", missing=name)
    if not isinstance(value, (list, tuple)):
        raise Rejected(f"{name} is not a list")
    return value


def _ratings(row: Mapping[str, Any], count: int) -> list[float | None]:
    found = [_rating(value) for value in _list(row, "ratings")]
    if len(found) != count:
        raise Rejected("responses and ratings are not equally many")
    return found


def _rating(value: Any) -> float | None:
    """Return a rating as a number, also one that is written as text; None where none was given."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNRATED):
        return None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.inf
        if math.isnan(number):
            return None
        if math.isfinite(number):
            return number
    raise Rejected("a rating is not a number")


def _follow(row: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Return whether a row has a column or a path to one, and what stands there; of a list, what stands in each item."""
    if path in row:
        return True, row[path]
    first, dot, rest = path.partition(".")
    if not dot or first not in row:
        return False, None
    return _inside(row[first], rest)


def _inside(value: Any, path: str) -> tuple[bool, Any]:
    if isinstance(value, Mapping):
        return _follow(value, path)
    if isinstance(value, (list, tuple)):
        found = [_inside(item, path) for item in value]
        return any(there for there, _ in found), [inner for _, inner in found]
    return False, None
