"""Says what this machine offers: packages, GPU, compute types, quantisation, attention kernels, memory, disk.

It has to work where hardly anything else does. So no package is imported at the top, and whatever goes wrong in a check
becomes a finding.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_ppo.cli.installed import (
    PACKAGES,
    Finding,
    Requirements,
    State,
    check,
    examine_other_packages,
    examine_package,
    examine_python,
    install_command,
    installed_version,
    read_requirements,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

GIB = 2**30

NF4_ERROR = 0.2
"""Largest relative error of a product with nf4 weights that counts as right; about 0.09 is usual for normal weights."""

FLASH_CAPABILITY = (8, 0)
"""Lowest CUDA compute capability (Ampere) that flash-attention 2 has kernels for."""

FEW_BYTES, TOO_FEW_BYTES = 10 * GIB, GIB
"""Free disk below which a run may not fit, and below which it will not."""

WORTH_ROUNDING = 1.5
"""How much faster bf16 must multiply for a run to be faster: much of a step is neither."""

NO_QUANTIZATION = "leave model.quantization at null; python -m bitsandbytes says more"

GPU_HEALTH = "see whether nvidia-smi lists the GPU; set model.device=cpu to go on without it"

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def doctor(console: Console | None = None, as_json: bool = False, model: str | None = None) -> int:
    """Print what `examine` finds; return 1 if any of it is a problem, else 0.

    Args:
        console: where to print; stdout when None.
        as_json: print {"ok": bool, "findings": [{name, value, state, hint}]}, hint null where there is none.
        model: that is looked at too: folder, hub name or run.
    """
    findings = examine()
    if model is not None:
        with _quiet():
            from hydra_ppo.cli.doctor_model import examine_model

            findings += examine_model(model)
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
        requirements = read_requirements()
        sdpa = "set model.attention=sdpa"
        return [
            check("Python", "pip install .", examine_python),
            check("torch", install_command("torch", requirements), _torch, requirements),
            *(gpus := _gpus()),
            check("bf16", "set model.dtype=fp32", _bf16, needs=("torch",)),
            *(
                []
                if gpus[0].name == "GPU 0"
                else [check("CPU speed", "leave model.dtype at auto", _cpu_speed, needs=("torch",))]
            ),
            *(
                check(name, install_command(name, requirements), examine_package, name, requirements, module)
                for name, module in PACKAGES.items()
            ),
            check("other packages", "pip install .", examine_other_packages, requirements),
            check("4-bit base", NO_QUANTIZATION, _four_bit, needs=("torch", "bitsandbytes")),
            check("flash-attn", sdpa, _flash_attention, requirements, needs=("torch",)),
            check("attention=auto", sdpa, _attention, needs=("torch", "transformers")),
            check("CPU memory", "pip install --upgrade psutil", _memory),
            check("disk", "change to a folder that exists and can be read", _disk),
        ]


# -- device --------------------------------------------------------------------------------------------------------------


def _torch(requirements: Requirements) -> Finding:
    finding = examine_package("torch", requirements, "torch")
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
    count = check("GPU", GPU_HEALTH, _gpu_count, needs=("torch",))
    if not count.value.isdecimal():
        return [count]
    found = [check(f"GPU {index}", GPU_HEALTH, _gpu, index) for index in range(int(count.value))]
    return found or [check("GPU", GPU_HEALTH, _no_gpu)]


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


def _cpu_speed() -> Finding:
    """Time products in fp32 and bf16: what `model.dtype` and `rollout.weights` are best set to on a machine without a GPU."""
    import torch

    from hydra_ppo.compute.rates import BF16, FP32, FP32_OURS, rates

    found = {name: rate / 1e9 for name, rate in rates().items()}
    threads = torch.get_num_threads()
    value = (
        f"{found[FP32_OURS]:.0f} billion multiply-adds a second in fp32 ({found[FP32]:.0f} by torch's own choice), "
        f"{found[BF16]:.0f} in bf16, {threads} {'thread' if threads == 1 else 'threads'}"
    )
    if found[BF16] < WORTH_ROUNDING * found[FP32_OURS]:
        return Finding("CPU speed", f"{value}; model.dtype=fp32 is right")
    return Finding(
        "CPU speed", value, "note", "model.dtype=bf16 is faster here, and rollout.weights=merged-bf16 decodes faster"
    )


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


def _flash_attention(requirements: Requirements) -> Finding:
    name = "flash-attn"
    if importlib.util.find_spec("flash_attn") is None:
        if not _on_gpu():
            return Finding(name, "not installed, and of no use without a GPU", "note")
        remedy = f"{install_command(name, requirements)} --no-build-isolation"
        return Finding(name, "not installed; attention is by SDPA", "note", remedy)
    if not _on_gpu():
        return Finding(name, f"{installed_version(name) or 'installed'}, not usable: the device is {_device().type}", "note")
    # From here on attention=auto takes it, so whatever is wrong with it stops a run.
    finding = examine_package(name, requirements, "flash_attn")
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
    state: State = "problem" if free < TOO_FEW_BYTES else "note" if free < FEW_BYTES else "ok"
    remedy = None if state == "ok" else "set run.output to a folder on a disk with more space, run.save_every=0 writes less"
    return Finding("disk", f"{_gib(free)} free in the working directory", state, remedy)


# -- shared --------------------------------------------------------------------------------------------------------------


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
