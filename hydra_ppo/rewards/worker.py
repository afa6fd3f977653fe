"""The process that a reward function runs in: `python -m hydra_ppo.rewards.worker FD`, started by `isolated`.

It imports neither torch nor anything else that the function's module does not, answers one request after the other, and ends
with the process that started it. What is asked and answered are pickled tuples, the first word says what:

    load target path          -> loaded file, or refused message
    check columns             -> checked, or refused message
    call responses states     -> returned value states, or raised ...
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.rewards.functions import FunctionSource, Unsendable, place_of, what_it_said
from hydra_ppo.runtime.random_states import read_states, write_state, write_states

SENDABLE = (bool, int, float, str, bytes, list, tuple, set, frozenset, dict, type(None))
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until nobody asks any more."""
    _end_with_parent()
    connection = Connection(int(sys.argv[1]))
    source: FunctionSource | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request[0] == "load":
            _, target, sys.path[:] = request
            source, answer = _load(target)
        elif source is None:
            return
        elif request[0] == "check":
            answer = _checked(source, request[1])
        else:
            answer = _called(source, *request[1:])
        connection.send(answer)


def _end_with_parent() -> None:
    """Let the system end this process with the one that started it, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit()


def _load(target: str) -> tuple[FunctionSource | None, tuple[Any, ...]]:
    try:
        return FunctionSource(target), ("loaded", getattr(sys.modules.get(target.split(":")[0]), "__file__", None))
    except ConfigError as error:
        return None, ("refused", str(error))
    except BaseException as error:  # a module may end the process that imports it
        return None, ("refused", f"reward target={target!r} cannot be imported: it {what_it_said(error)}; mend the module.")


def _checked(source: FunctionSource, columns: set[str]) -> tuple[Any, ...]:
    try:
        source.check(columns)
    except ConfigError as error:
        return ("refused", str(error))
    return ("checked",)


def _called(source: FunctionSource, responses: Any, states: Mapping[str, Any]) -> tuple[Any, ...]:
    missing = write_states(states)
    hook = _WriteWhenImported({name: states[name] for name in missing})
    sys.meta_path.insert(0, hook)
    try:
        return ("returned", plain(source(responses)), read_states())
    except ConfigError as error:
        return ("refused", str(error))
    except BaseException as error:  # whatever a function raises: it ends the run, and not this process without a word
        return ("raised", what_it_said(error), place_of(error), "".join(traceback.format_exception(error)))
    finally:
        sys.meta_path.remove(hook)


def plain(value: Any) -> Any:
    """Return a value of plain types: arrays and tensors as lists, also inside of lists and mappings."""
    if callable(getattr(value, "tolist", None)):  # arrays, tensors, columns of a table
        return value.reshape(-1).tolist() if getattr(value, "shape", ()) and hasattr(value, "reshape") else value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if type(value) in SENDABLE:
        return value
    if hasattr(value, "__float__"):  # Decimal, Fraction
        return float(value)
    return Unsendable(type(value).__name__)


class _WriteWhenImported(importlib.abc.MetaPathFinder):
    """Brings the random numbers of a library that a function imports only when it is called to where they ought to be."""

    def __init__(self, states: dict[str, Any]) -> None:
        self.states = states

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.states:
            return None
        state = self.states.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                write_state(name, state)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    main()
