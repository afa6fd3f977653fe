"""Runs what is validated part by part within a budget of seconds, whatever becomes of a part."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from hydra_ppo.errors import ConfigError
from hydra_ppo.profiling.workload import Workload

DECODE_SHARE = 0.4
"""Part of a check's seconds that decoding may take; loading, simulating, scoring and updating need the rest."""

LEAST_RESPONSE = 32
"""Shorter responses than this say nothing about a phase."""


class NotRun(Exception):
    """A part was left out on purpose; the message is the reason."""


def require(quantization: str | None) -> None:
    """Raise NotRun where the base needs bitsandbytes and there is none."""
    if quantization is not None and find_spec("bitsandbytes") is None:
        raise NotRun(f"quantization={quantization!r} needs bitsandbytes, which is not installed here.")


@dataclass(frozen=True)
class Part:
    """One thing to validate.

    Attributes:
        name: under which it is recorded.
        run: takes the seconds that it may take and returns what it found, `passed` and `summary` among it.
        weight: its claim on the time that is left, relative to that of the parts after it.
        least: seconds below which it is not begun.
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    weight: float
    least: float


@dataclass
class Budget:
    """Time that is to be shared out.

    Attributes:
        seconds: in all.
        clock: gives the time in seconds.
    """

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"budget={self.seconds:g} must be above 0 seconds; choose a larger one.")
        self.begun = self.clock()

    @property
    def used(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.begun

    def share(self, part: Part, later: Sequence[Part]) -> float:
        """Return the seconds that `part` may take if those `later` are to have theirs."""
        return max(0.0, self.seconds - self.used) * part.weight / sum(p.weight for p in (part, *later))


def run_parts(
    parts: Sequence[Part],
    budget: Budget,
    keep: Callable[[dict[str, Any]], None],
    clean: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Run the parts one after the other, each within its share of the budget.

    Args:
        parts: in order.
        budget: shared out as it is left, so that what one part does not use goes to those after it.
        keep: given everything found so far after each part.
        clean: called before each part, when nothing of the last is referred to any more.

    Returns:
        By name what a part found, `{"skipped": reason}` or `{"error": text, "traceback": lines}`; each with its `seconds`.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(parts):
        share, begun = budget.share(part, parts[number + 1 :]), budget.used
        say(budget, f"{number + 1}/{len(parts)} {part.name}, {share:.0f} s")
        try:
            if share < part.least:
                raise NotRun(f"budget={budget.seconds:g} s leaves {share:.0f} s for this, and it needs {part.least:g}.")
            clean()
            result = part.run(share)
        except NotRun as reason:
            result = {"skipped": str(reason)}
        except Exception as error:  # the parts after it are still worth having
            result = {"error": _one_line(error), "traceback": traceback.format_exc().splitlines()}
        found[part.name] = result | {"seconds": budget.used - begun}
        say(budget, f"{part.name}: {verdict(result)}, {described(result)}")
        keep(found)
    return found


def verdict(result: dict[str, Any]) -> str:
    """Return passed, missed, skipped or failed."""
    if "error" in result:
        return "failed"
    if "skipped" in result:
        return "skipped"
    return "passed" if result["passed"] else "missed"


def described(result: dict[str, Any]) -> str:
    """Return what there is to say about a result, in a line."""
    return next(str(result[name]) for name in ("error", "skipped", "summary") if name in result)


def shortened(workload: Workload, seconds: float, step: float) -> Workload:
    """Return the workload with responses that decode within `DECODE_SHARE` of `seconds` at `step` seconds a token.

    Raises:
        NotRun: when these would be shorter than `LEAST_RESPONSE` tokens.
    """
    response = min(workload.response, int(DECODE_SHARE * seconds / step))
    least = min(workload.response, LEAST_RESPONSE)
    if response < least:
        raise NotRun(
            f"response={response} is all that can be decoded in {DECODE_SHARE * seconds:.0f} s at {step:.3f} s a token, and "
            f"below the least of {least}; give a larger --budget."
        )
    return replace(workload, response=response)


def say(budget: Budget, text: str) -> None:
    """Write a line of progress to stderr."""
    print(f"[{budget.used:4.0f} s] {text}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'without a message'}"
