"""Says what this machine offers: packages, GPU, compute types, quantisation, attention kernels, memory, disk.

It has to work where hardly anything else does. So nothing but the standard library is imported at the top, and whatever
goes wrong in a check becomes a finding.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from rich.console import Console

GIB = 2**30

PACKAGES = {
    "transformers": "transformers.modeling_utils",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "accelerate": "accelerate",
}
"""Package: the module whose import shows that it works; `import transformers` alone loads next to nothing."""

NF4_ERROR = 0.2
"""Largest relative error of a product with nf4 weights that counts as right; about 0.09 is usual for normal weights."""

FLASH_CAPABILITY = (8, 0)
"""Lowest CUDA compute capability (Ampere) that flash-attention 2 has kernels for."""

FEW_BYTES, TOO_FEW_BYTES = 10 * GIB, GIB
"""Free disk below which a run may not fit, and below which it will not."""

NO_QUANTIZATION = "leave model.quantization at null; python -m bitsandbytes says more"

GPU_HEALTH = "see whether nvidia-smi lists the GPU; set model.device=cpu to go on without it"

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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
    state: Literal["ok", "note", "problem"] = "ok"
    hint: str | None = None


@dataclass(frozen=True)
class _Requirements:
    """Lowest supported version by package, as this package's own metadata has them."""

    required: dict[str, str]
    optional: dict[str, str]


def doctor(console: Console | None = None, as_json: bool = False) -> int:
    """Print what `examine` finds; return 1 if any of it is a problem, else 0.

    Args:
        console: where to print; stdout when None.
        as_json: print {"ok": bool, "findings": [{name, value, state, hint}]}, hint null where there is none.
    """
    findings = examine()
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        text = json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2)
    else:
        text = _lines(findings)
    if console is None:
        print(text)
    else:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Look at everything, without raising or printing; some seconds, most of them spent on imports."""
    with _quiet():
        requirements = _requirements()
        sdpa = "set model.attention=sdpa"
        return [
            _check("Python", "pip install .", _python),
            _check("torch", _install("torch", requirements), _torch, requirements),
            *_gpus(),
            _check("bf16", "set model.dtype=fp32", _bf16, needs=("torch",)),
            *(_check(name, _install(name, requirements), _package, name, requirements, PACKAGES[name]) for name in PACKAGES),
            _check("other packages", "pip install .", _other_packages, requirements),
            _check("4-bit base", NO_QUANTIZATION, _four_bit, needs=("torch", "bitsandbytes")),
            _check("flash-attn", sdpa, _flash_attention, requirements, needs=("torch",)),
            _check("attention=auto", sdpa, _attention, needs=("torch", "transformers")),
            _check("CPU memory", "pip install --upgrade psutil", _memory),
            _check("disk", "change to a folder that exists and can be read", _disk),
        ]


# -- Python and packages -------------------------------------------------------------------------------------------------


def _python() -> Finding:
    version = platform.python_version()
    try:
        metadata = importlib.metadata.metadata("hydra-ppo")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Python", f"{version}; hydra-ppo is not installed", "problem", "pip install . (in its checkout)")
    bound = (metadata["Requires-Python"] or "").removeprefix(">=")
    if bound and _release(version) < _release(bound):
        remedy = f"make a virtual environment with Python {bound} or newer and install hydra-ppo there"
        return Finding("Python", f"{version} is older than {bound}", "problem", remedy)
    return Finding("Python", f"{version}; hydra-ppo {metadata['Version']}")


def _package(name: str, requirements: _Requirements, module: str) -> Finding:
    """Say whether a package is there, new enough, and can be imported."""
    version = _version(name)
    bound = (requirements.required | requirements.optional).get(name)
    remedy = _install(name, requirements)
    if version is None:
        return Finding(name, "not installed", "problem", remedy)
    if bound is not None and _release(version) < _release(bound):
        return Finding(name, f"{version} is older than {bound}", "problem", remedy)
    try:
        importlib.import_module(module)
    except Exception as error:
        remedy = remedy.replace("--upgrade", "--force-reinstall")
        return Finding(name, f"{version} cannot be imported: {_first_line(error)}", "problem", remedy)
    return Finding(name, f"{version} (needs {bound} or newer)" if bound else version)


def _other_packages(requirements: _Requirements) -> Finding:
    """Say whether everything else that this package requires is there; nothing is imported."""
    bounds = {name: bound for name, bound in requirements.required.items() if name not in (*PACKAGES, "torch")}
    faults = {}
    for name, bound in bounds.items():
        version = _version(name)
        if version is None:
            faults[name] = f"{name} is not installed"
        elif _release(version) < _release(bound):
            faults[name] = f"{name} {version} is older than {bound}"
    if not faults:
        return Finding("other packages", f"{', '.join(bounds)}: as required")
    wanted = " ".join(f"'{name}>={bounds[name]}'" for name in faults)
    return Finding("other packages", ", ".join(faults.values()), "problem", f"pip install --upgrade {wanted}")


def _requirements() -> _Requirements:
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
    return _Requirements(required, optional)


def _install(name: str, requirements: _Requirements) -> str:
    bound = (requirements.required | requirements.optional).get(name)
    return f"pip install --upgrade '{name}>={bound}'" if bound else f"pip install --upgrade {name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError):  # KeyError: what a removal that was cut short leaves
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return 2.13.0+cpu as (2, 13); `packaging` could, but may be what is missing."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


# -- device --------------------------------------------------------------------------------------------------------------


def _torch(requirements: _Requirements) -> Finding:
    finding = _package("torch", requirements, "torch")
    if finding.state == "problem":
        return finding
    import torch

    if torch.version.cuda is not None:
        return Finding("torch", f"{finding.value}, built for CUDA {torch.version.cuda}")
    if torch.version.hip is not None:
        return Finding("torch", f"{finding.value}, built for ROCm {torch.version.hip}")
    if _nvidia_driver():
        remedy = "pip install --force-reinstall torch (from PyPI on Linux; elsewhere the command at pytorch.org/get-started)"
        return Finding("torch", f"{finding.value}, a CPU build on a machine with an NVIDIA driver", "problem", remedy)
    return Finding("torch", f"{finding.value}, a CPU build")


def _gpus() -> list[Finding]:
    """Describe each GPU; one finding where there is none."""
    count = _check("GPU", GPU_HEALTH, _gpu_count, needs=("torch",))
    if not count.value.isdecimal():
        return [count]
    found = [_check(f"GPU {index}", GPU_HEALTH, _gpu, index) for index in range(int(count.value))]
    return found or [_check("GPU", GPU_HEALTH, _no_gpu)]


def _gpu_count() -> Finding:
    import torch

    return Finding("GPU", str(torch.cuda.device_count() if _on_gpu() else 0))


def _gpu(index: int) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    value = f"{torch.cuda.get_device_name(index)}, {_gib(total)}, {_gib(free)} free"
    if free < total / 2:
        return Finding(f"GPU {index}", value, "note", "end what holds its memory; nvidia-smi names it")
    return Finding(f"GPU {index}", value)


def _no_gpu() -> Finding:
    import torch

    if torch.version.cuda is None or not _nvidia_driver():
        return Finding("GPU", "none; model.device=auto takes the CPU", "note")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    remedy = "unset CUDA_VISIBLE_DEVICES" if hidden else f"update the NVIDIA driver; {GPU_HEALTH}"
    return Finding("GPU", "none that torch can use, though an NVIDIA driver is there", "problem", remedy)


def _bf16() -> Finding:
    import torch

    if _on_gpu():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("bf16", "supported by the GPU")
        return Finding("bf16", "not supported by the GPU, only emulated", "note", "set model.dtype=fp16")
    ones = torch.ones(8, 8, dtype=torch.bfloat16)
    if (ones @ ones)[0, 0].item() != 8:
        return Finding("bf16", "gives wrong products on this CPU", "problem", "set model.dtype=fp32")
    return Finding("bf16", "works on the CPU; model.dtype=auto takes fp32 there")


def _four_bit() -> Finding:
    """Quantise a layer to nf4 on the device and multiply with it."""
    device = _device()
    error = nf4_error(device)
    if not error < NF4_ERROR:
        value = f"nf4 on {device.type} gives a relative error of {error:.2g}, about 0.09 is right"
        return Finding("4-bit base", value, "problem", NO_QUANTIZATION)
    return Finding("4-bit base", f"nf4 works on {device.type} (relative error {error:.2g})")


def nf4_error(device: torch.device) -> float:
    """Return the relative error of a product of 8 rows with 64 x 64 normal weights held as nf4 on `device`."""
    import bitsandbytes as bnb
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    rows = torch.randn(8, 64, generator=generator)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    expected = rows @ weight.T
    found = layer.to(device)(rows.to(device)).detach().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def _flash_attention(requirements: _Requirements) -> Finding:
    name = "flash-attn"
    if importlib.util.find_spec("flash_attn") is None:
        if not _on_gpu():
            return Finding(name, "not installed, and of no use without a GPU", "note")
        remedy = f"{_install(name, requirements)} --no-build-isolation"
        return Finding(name, "not installed; attention is by SDPA", "note", remedy)
    if not _on_gpu():
        return Finding(name, f"{_version(name) or 'installed'}, not usable: the device is {_device().type}", "note")
    # From here on attention=auto takes it, so whatever is wrong with it stops a run.
    finding = _package(name, requirements, "flash_attn")
    if finding.state == "problem":
        return Finding(name, finding.value, "problem", f"{finding.hint} --no-build-isolation, or set model.attention=sdpa")
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < FLASH_CAPABILITY:
        value = f"{finding.value}, not usable: the GPU has compute capability {capability[0]}.{capability[1]}, not 8.0 or more"
        return Finding(name, value, "problem", "set model.attention=sdpa, or pip uninstall flash-attn")
    return Finding(name, f"{finding.value}, usable with bf16 and fp16")


def _attention() -> Finding:
    import torch

    from hydra_ppo.model.loading import resolve_attention

    chosen = resolve_attention("auto", _device(), torch.bfloat16)
    return Finding("attention=auto", f"takes {chosen} for bf16 on {_device().type}")


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if _on_gpu() else "cpu")


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


# -- memory and disk -----------------------------------------------------------------------------------------------------


def _memory() -> Finding:
    try:
        import psutil
    except ImportError:  # comes with accelerate and peft
        return Finding("CPU memory", "not checked: psutil is not installed", "note", "pip install psutil")
    memory = psutil.virtual_memory()
    value = f"{_gib(memory.total)}, {_gib(memory.available)} available"
    # psutil reads the machine's numbers, also in a container that may use less.
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    if limit.isdecimal() and int(limit) < memory.total:
        value += f"; this container may use {_gib(int(limit))}"
    return Finding("CPU memory", value)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    state = "problem" if free < TOO_FEW_BYTES else "note" if free < FEW_BYTES else "ok"
    remedy = None if state == "ok" else "set run.output to a folder on a disk with more space, run.save_every=0 writes less"
    return Finding("disk", f"{_gib(free)} free in the working directory", state, remedy)


# -- shared --------------------------------------------------------------------------------------------------------------


def _check(name: str, remedy: str, look: Callable[..., Finding], *args: Any, needs: Sequence[str] = ()) -> Finding:
    """Return what `look(*args)` finds; an exception is a finding too, and so is a package missing that it `needs`."""
    for package in needs:
        try:
            importlib.import_module(PACKAGES.get(package, package))
        except Exception:
            return Finding(name, f"not checked: that needs {package}", "note")
    try:
        return look(*args)
    except Exception as error:
        return Finding(name, f"failed: {_first_line(error)}", "problem", remedy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what packages log and warn of while they are imported and tried out of the output."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _lines(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.value}")
        if finding.hint is not None:
            lines.append(f"{'':<7}  {'':<{width}}  -> {finding.hint}")
    counts = [f"{sum(finding.state == state for finding in findings)} {state}" for state in ("ok", "note", "problem")]
    return "\n".join([*lines, ", ".join(counts)])


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
