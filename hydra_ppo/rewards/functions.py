"""Python functions as rewards: how they are found, what they are given by the names of their parameters, and called."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Collection
from inspect import Parameter
from pathlib import Path
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.rewards.responses import Responses, columns_in_words, columns_of

OURS = str(Path(__file__).parents[1])
KNOWN = ("prompts", "responses", "messages", "columns", "ended")
"""Names of parameters that say what they want; any other name is a column of the rows."""


def what_it_said(error: BaseException) -> str:
    """Return what a function did, for the sentence that begins with its name."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


def place_of(error: BaseException) -> str:
    """Say where in foreign code an error arose: file, line and function; nothing where it arose in ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(OURS)]
    if not frames:
        return ""
    # The innermost frame of the user's own code says more than one deep inside a library.
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith(sys.prefix)]
    frame = (own or frames)[-1]
    return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"


def load_function(target: str) -> Callable[..., Any]:
    """Import a reward function.

    Raises:
        ConfigError: when there is none of that name, or its module does not run.
    """
    module_name, function_name = target.split(":")
    # A console script does not have the working directory on its path; `python -m` does. Users expect it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module may raise anything
        raise ConfigError(
            f"reward target={target!r} cannot be imported ({type(error).__name__}: {error}); check module and function name, "
            "and run from the folder that holds the module."
        ) from error
    if isinstance(function, type):
        return _made(target, function)
    if not callable(function):
        raise ConfigError(f"reward target={target!r} is not callable; name a function over (prompts, responses).")
    return function


class Unsendable:
    """Stands for a value that no list of numbers is made of, and may not survive the way between two processes.

    Attributes:
        kind: name of its type.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _made(target: str, kind: type) -> Callable[..., Any]:
    """Make the one object of a class, whose `__call__` is the function.

    Raises:
        ConfigError: where it takes arguments, or cannot be called.
    """
    if "__call__" not in dir(kind):
        raise ConfigError(f"reward target={target!r} is a class without __call__; name a function over (prompts, responses).")
    try:
        made: Callable[..., Any] = kind()
    except Exception as error:
        raise ConfigError(
            f"reward target={target!r} is a class that cannot be made without arguments ({type(error).__name__}: {error}); "
            "name an object of it, or a function."
        ) from error
    return made


class FunctionSource:
    """A function as a reward source.

    It is given what its parameters name: `prompts`, `responses`, `messages` (with the answer; None for a prompt of text),
    `columns` (the row's other columns, a mapping each), `ended`, or one column of the rows by its own name; each a list with
    an entry for each response. Two first positional parameters that name nothing of these are prompts and responses. Of what
    nobody asked for all goes to `**rest`, where there is one.

    Args:
        target: `package.module:function`.

    Raises:
        ConfigError: see `load_function`.
    """

    remedy = "mend the function"

    def __init__(self, target: str) -> None:
        self.target = target
        self.function = load_function(target)
        self._columns: set[str] = set()
        self._awaiting = _Awaiting()
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            parameters = [Parameter("prompts", Parameter.POSITIONAL_ONLY), Parameter("responses", Parameter.POSITIONAL_ONLY)]
        positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
        self._by_position = _by_position(positional, parameters)
        self._first = positional[:2] if self._by_position else []
        self._named = [p for p in parameters if p in positional[len(self._first) :] or p.kind is Parameter.KEYWORD_ONLY]
        self._rest = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
        hidden = [p.name for p in self._named if p.kind is Parameter.POSITIONAL_ONLY]
        if hidden:
            raise ConfigError(f"reward target={target!r} takes {hidden[0]!r} by position alone; let it be given by name.")

    def check(self, columns: Collection[str]) -> None:
        """Refuse a parameter that names nothing there is, or two things.

        Args:
            columns: of the rows, beside prompt and answers.

        Raises:
            ConfigError: naming the parameter.
        """
        self._columns |= set(columns)
        self._check(columns)

    def _check(self, columns: Collection[str]) -> None:
        for parameter, meaning in zip(self._first, KNOWN, strict=False):
            if parameter.name != meaning and parameter.name in columns:
                raise ConfigError(
                    f"reward target={self.target!r} takes {parameter.name!r} as its {meaning}, by position, and the rows have "
                    f"a column of that name; call the parameter {meaning}, or let the column be given by name alone (after *)."
                )
        for parameter in self._named:
            known = parameter.name in KNOWN or parameter.name in columns
            if not known and parameter.default is Parameter.empty:
                raise ConfigError(
                    f"reward target={self.target!r} takes {parameter.name!r}, which is none of {', '.join(KNOWN)}, and the "
                    f"data {columns_in_words(columns)}; rename the parameter, or give it a default."
                )

    def __call__(self, responses: Responses) -> Any:
        """Call the function, await it where it is async, and return what it returns.

        Raises:
            ConfigError: where it takes what there is not.
        """
        columns = self._columns | columns_of(responses.columns)
        self._check(columns)
        arguments = [_value(responses, name) for name in KNOWN[:2]] if self._by_position else []
        names = [p.name for p in self._named if p.name in KNOWN or p.name in columns]
        if self._rest:
            others = [*KNOWN, *sorted(columns)]
            taken = {p.name for p in self._first} | (set(KNOWN[:2]) if self._by_position else set())
            names += [name for name in others if name not in taken and name not in names]
        found = self.function(*arguments, **{name: _value(responses, name) for name in names})
        return self._awaiting(found) if inspect.isawaitable(found) else found


def _by_position(positional: list[Parameter], parameters: list[Parameter]) -> bool:
    """Say whether the first two parameters are prompts and responses whatever they are called."""
    if len(positional) < 2 and not any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return False
    return all(p.name == meaning or p.name not in KNOWN for p, meaning in zip(positional, KNOWN, strict=False))


def _value(given: Responses, name: str) -> list[Any]:
    """Return what a name stands for, made anew, so that a function may change what it is given."""
    if name == "messages":
        return list(given.messages())
    if name == "columns":
        return [dict(row) for row in given.columns]
    known = {"prompts": given.prompts, "responses": given.texts, "ended": given.ended}
    return list(known[name]) if name in known else given.column(name)


class _Awaiting:
    """Awaits what async functions return, always in the same event loop: clients that they keep belong to it."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def __call__(self, found: Awaitable[Any]) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._run(found)
        return self._run_beside(found)  # in a notebook, whose own loop cannot be left for another one

    def _run(self, found: Awaitable[Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
            weakref.finalize(self, _close, self._runner)
        try:
            return self._runner.run(_whole(found))
        except BaseException:
            # A time limit or a stop can leave tasks behind; closing the loop cancels them.
            self._runner.close()
            self._runner = None
            raise

    def _run_beside(self, found: Awaitable[Any]) -> Any:
        results: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(asyncio.run(_whole(found)))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True, name="async-reward")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]


async def _whole(found: Awaitable[Any]) -> Any:
    return await found


def _close(runner: asyncio.Runner) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # inside another loop it cannot be closed in order; the loop then closes when it is collected
        runner.close()
