"""Whether Python and the packages of this program are there, new enough, and can be imported; and what a finding is.

The part of the doctor that needs nothing but the standard library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PACKAGES = {
    "transformers": "transformers.modeling_utils",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "accelerate": "accelerate",
}
"""Package: the module whose import shows that it works; `import transformers` alone loads next to nothing."""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        value: what was found.
        state: ok; note where something is slower or missing but works without; problem where a run would fail.
        hint: command or setting that fixes it; every problem has one.
    """

    name: str
    value: str
    state: State = "ok"
    hint: str | None = None


@dataclass(frozen=True)
class Requirements:
    """Lowest supported version by package, as this package's own metadata has them."""

    required: dict[str, str]
    optional: dict[str, str]


def check(name: str, remedy: str, look: Callable[..., Finding], *args: Any, needs: Sequence[str] = ()) -> Finding:
    """Return what `look(*args)` finds; an exception is a finding too, and so is a package missing that it `needs`."""
    for package in needs:
        try:
            importlib.import_module(PACKAGES.get(package, package))
        except Exception:
            return Finding(name, f"not checked: that needs {package}", "note")
    try:
        return look(*args)
    except Exception as error:
        return Finding(name, f"failed: {first_line(error)}", "problem", remedy)


def examine_python() -> Finding:
    """Say whether Python is new enough for this program, and which version of it is installed."""
    version = platform.python_version()
    try:
        metadata = importlib.metadata.metadata("hydra-ppo")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Python", f"{version}; hydra-ppo is not installed", "problem", "pip install . (in its checkout)")
    bound = (metadata["Requires-Python"] or "").removeprefix(">=")
    if bound and release(version) < release(bound):
        remedy = f"make a virtual environment with Python {bound} or newer and install hydra-ppo there"
        return Finding("Python", f"{version} is older than {bound}", "problem", remedy)
    return Finding("Python", f"{version}; hydra-ppo {metadata['Version']}")


def examine_package(name: str, requirements: Requirements, module: str) -> Finding:
    """Say whether a package is there, new enough, and can be imported."""
    version = installed_version(name)
    bound = (requirements.required | requirements.optional).get(name)
    remedy = install_command(name, requirements)
    if version is None:
        return Finding(name, "not installed", "problem", remedy)
    if bound is not None and release(version) < release(bound):
        return Finding(name, f"{version} is older than {bound}", "problem", remedy)
    try:
        importlib.import_module(module)
    except Exception as error:
        remedy = remedy.replace("--upgrade", "--force-reinstall")
        return Finding(name, f"{version} cannot be imported: {first_line(error)}", "problem", remedy)
    return Finding(name, f"{version} (needs {bound} or newer)" if bound else version)


def examine_other_packages(requirements: Requirements) -> Finding:
    """Say whether everything else that this package requires is there; nothing is imported."""
    bounds = {name: bound for name, bound in requirements.required.items() if name not in (*PACKAGES, "torch")}
    faults = {}
    for name, bound in bounds.items():
        version = installed_version(name)
        if version is None:
            faults[name] = f"{name} is not installed"
        elif release(version) < release(bound):
            faults[name] = f"{name} {version} is older than {bound}"
    if not faults:
        return Finding("other packages", f"{', '.join(bounds)}: as required")
    wanted = " ".join(f"'{name}>={bounds[name]}'" for name in faults)
    return Finding("other packages", ", ".join(faults.values()), "problem", f"pip install --upgrade {wanted}")


def read_requirements() -> Requirements:
    """Read what this package requires; nothing where it is not installed."""
    required: dict[str, str] = {}
    optional: dict[str, str] = {}
    try:
        lines = importlib.metadata.requires("hydra-ppo") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*\(?>=\s*([\d.]+)", line)
        if found:
            (optional if "extra ==" in line else required)[found[1]] = found[2]
    return Requirements(required, optional)


def install_command(name: str, requirements: Requirements) -> str:
    """Return the command that brings in a package, or a newer version of it."""
    bound = (requirements.required | requirements.optional).get(name)
    return f"pip install --upgrade '{name}>={bound}'" if bound else f"pip install --upgrade {name}"


def installed_version(name: str) -> str | None:
    """Return the version of a package; None where it is not there."""
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError):  # KeyError: what a removal that was cut short leaves
        return None


def release(version: str) -> tuple[int, ...]:
    """Return 2.13.0+cpu as (2, 13); `packaging` could, but may be what is missing."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def first_line(error: BaseException) -> str:
    """Return type and message of an exception, the first line of it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
