"""What the doctor says of machines that lack something; the machine at hand is patched into them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hydra_ppo.cli import doctor
from hydra_ppo.cli.doctor import GIB, examine
from hydra_ppo.cli.installed import Finding, release
from hydra_ppo.compat import FLASH_IS_BUILT_IN
from hydra_ppo.compute import rates

MEASURED = rates.rates
NAMES = [
    *("Python", "torch", "GPU", "bf16", "CPU speed", "transformers", "peft", "bitsandbytes", "accelerate"),
    "other packages",
    *("4-bit base", "flash-attn", "attention=auto", "CPU memory", "disk"),
]


@pytest.fixture(autouse=True)
def _cpu_machine(monkeypatch):
    """Make any machine one without a GPU, a driver and flash-attn, whose CPU is as fast in fp32 as in bf16."""
    monkeypatch.setattr(rates, "rates", lambda: {rates.FP32: 80e9, rates.FP32_OURS: 100e9, rates.BF16: 100e9})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: False)
    flash_attention_found(monkeypatch, False)


def flash_attention_found(monkeypatch, found: bool) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: (object() if found else None) if name == "flash_attn" else real(name, *a)
    )


def versions(monkeypatch, **changes: str | None) -> None:
    """Pretend that packages have other versions; None is not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str | None:
        key = name.replace("-", "_")
        if key not in changes:
            return real(name)
        if changes[key] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changes[key]

    monkeypatch.setattr(importlib.metadata, "version", version)


def broken(monkeypatch, module: str, error: Exception) -> None:
    """Make the import of a module fail."""
    real = importlib.import_module

    def import_module(name: str, *rest):
        if name == module:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)


def fake_gpu(monkeypatch, capability: tuple[int, int] = (9, 0), free: int = 70 * GIB, bf16: bool = True) -> None:
    """Pretend that there are two GPUs, and that nf4 works on them."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda index: f"Card {index}",
        "mem_get_info": lambda index: (free, 80 * GIB),
        "get_device_capability": lambda: capability,
        "is_bf16_supported": lambda including_emulation: bf16,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(doctor, "nf4_error", lambda device: 0.09)


def found() -> dict[str, Finding]:
    findings = examine()
    for finding in findings:
        assert finding.state in ("ok", "note", "problem")
        assert finding.state != "problem" or finding.hint, f"{finding.name} says no remedy"
    return {finding.name: finding for finding in findings}


def problems(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.state == "problem"]


def test_this_environment_is_fit():
    findings = found()
    assert list(findings) == NAMES
    assert problems(findings) == []
    assert findings["GPU"] == Finding("GPU", "none; model.device=auto takes the CPU", "note")
    assert findings["4-bit base"].value.startswith("nf4 works on cpu")
    assert findings["attention=auto"].value == "takes sdpa for bf16 on cpu"


def test_nf4_error_is_that_of_rounding_to_four_bits():
    error = doctor.nf4_error(torch.device("cpu"))
    assert 0.02 < error < doctor.NF4_ERROR


def test_a_missing_package(monkeypatch):
    versions(monkeypatch, peft=None)
    monkeypatch.setitem(sys.modules, "peft", None)
    findings = found()
    assert findings["peft"] == Finding("peft", "not installed", "problem", "pip install --upgrade 'peft>=0.13'")
    assert problems(findings) == ["peft"]


def test_a_broken_package(monkeypatch):
    broken(monkeypatch, "bitsandbytes", RuntimeError("libcudart.so is missing\nand more"))
    findings = found()
    assert "cannot be imported: RuntimeError: libcudart.so is missing" in findings["bitsandbytes"].value
    assert findings["bitsandbytes"].hint == "pip install --force-reinstall 'bitsandbytes>=0.49'"
    assert findings["4-bit base"] == Finding("4-bit base", "not checked: that needs bitsandbytes", "note")


def test_without_torch(monkeypatch):
    versions(monkeypatch, torch=None)
    broken(monkeypatch, "torch", ModuleNotFoundError("No module named 'torch'"))
    findings = found()
    assert findings["torch"] == Finding("torch", "not installed", "problem", "pip install --upgrade 'torch>=2.11'")
    for name in ("GPU", "bf16", "CPU speed", "4-bit base", "flash-attn", "attention=auto"):
        assert findings[name] == Finding(name, "not checked: that needs torch", "note")


def test_packages_that_are_too_old(monkeypatch):
    versions(monkeypatch, torch="2.9.1+cpu", transformers="4.45.2", rich="13.9.4", datasets=None)
    findings = found()
    assert findings["torch"].value == "2.9.1+cpu is older than 2.11"
    assert findings["transformers"].value == "4.45.2 is older than 4.46"
    assert findings["transformers"].hint == "pip install --upgrade 'transformers>=4.46'"
    assert findings["other packages"].value == "datasets is not installed, rich 13.9.4 is older than 14.0"
    assert findings["other packages"].hint == "pip install --upgrade 'datasets>=3.6' 'rich>=14.0'"


def test_a_distribution_without_a_version_counts_as_missing(monkeypatch):
    # importlib.metadata gives None where a removal that was cut short left a folder without METADATA
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    assert found()["accelerate"].value == "not installed"


def test_without_an_installed_hydra_ppo(monkeypatch):
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    monkeypatch.setattr(importlib.metadata, "requires", missing)
    findings = found()
    assert problems(findings) == ["Python"]
    assert findings["Python"].value.endswith("hydra-ppo is not installed")


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9", "2.11"), ("2.13.0+cpu", "2.13.1"), ("4.9.9", "5"), ("0.9rc1", "1.0.dev0"), ("", "0.1")]
)
def test_versions_by_their_numbers(older, newer):
    assert release(older) < release(newer)
    assert release("4.0") == release("4")


@pytest.mark.parametrize(("bf16", "state"), [(149e9, "ok"), (150e9, "note")])
def test_bf16_is_named_where_it_is_faster_by_half(monkeypatch, bf16, state):
    monkeypatch.setattr(rates, "rates", lambda: {rates.FP32: 80e9, rates.FP32_OURS: 100e9, rates.BF16: bf16})
    finding = found()["CPU speed"]
    assert finding.state == state
    assert finding.value.startswith(
        f"100 billion multiply-adds a second in fp32 (80 by torch's own choice), {bf16 / 1e9:.0f} in"
    )
    assert ("model.dtype=bf16" in finding.hint) if state == "note" else ("model.dtype=fp32 is right" in finding.value)


def test_rates_are_those_of_the_median_round():
    """Kernels take turns; a clock that jumps in one round, and in the first, which does not count."""
    lengths = [9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 1.0, 8.0, 4.0, 1.0, 2.0, 4.0]
    times = iter([moment for length in lengths for moment in (0.0, length)])
    work = rates.ROWS * rates.INPUTS * rates.OUTPUTS
    assert MEASURED(3, lambda: next(times)) == {rates.FP32: work, rates.FP32_OURS: work / 2, rates.BF16: work / 4}


def test_two_gpus(monkeypatch):
    fake_gpu(monkeypatch)
    findings = found()
    assert findings["GPU 0"] == Finding("GPU 0", "Card 0, 80.0 GiB, 70.0 GiB free")
    assert findings["GPU 1"].value == "Card 1, 80.0 GiB, 70.0 GiB free"
    assert findings["torch"].value.endswith("built for CUDA 12.8")
    assert findings["bf16"] == Finding("bf16", "supported by the GPU")
    assert "CPU speed" not in findings
    assert findings["flash-attn"].hint == "pip install --upgrade 'flash-attn>=2.8' --no-build-isolation"
    assert findings["attention=auto"].value == "takes sdpa for bf16 on cuda"
    assert problems(findings) == []


def test_an_old_and_busy_gpu(monkeypatch):
    fake_gpu(monkeypatch, capability=(7, 5), free=10 * GIB, bf16=False)
    flash_attention_found(monkeypatch, True)
    versions(monkeypatch, flash_attn="2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    findings = found()
    assert findings["GPU 0"].state == "note"
    assert findings["bf16"].hint == "set model.dtype=fp16"
    assert "compute capability 7.5" in findings["flash-attn"].value
    assert problems(findings) == ["flash-attn"]


def test_flash_attention_that_works(monkeypatch):
    fake_gpu(monkeypatch)
    flash_attention_found(monkeypatch, True)
    versions(monkeypatch, flash_attn="2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    findings = found()
    assert findings["flash-attn"].value == "2.8.3 (needs 2.8 or newer), usable with bf16 and fp16"
    kernel = "sdpa" if FLASH_IS_BUILT_IN else "flash_attention_2"
    assert findings["attention=auto"].value == f"takes {kernel} for bf16 on cuda"


def test_flash_attention_that_cannot_be_imported(monkeypatch):
    fake_gpu(monkeypatch)
    flash_attention_found(monkeypatch, True)
    versions(monkeypatch, flash_attn="2.8.3")
    broken(monkeypatch, "flash_attn", ImportError("undefined symbol: _ZN3c104cuda"))
    findings = found()
    assert "undefined symbol" in findings["flash-attn"].value
    assert findings["flash-attn"].hint.endswith("or set model.attention=sdpa")


def test_flash_attention_on_a_machine_without_gpu(monkeypatch):
    flash_attention_found(monkeypatch, True)
    versions(monkeypatch, flash_attn="2.8.3")
    findings = found()
    assert findings["flash-attn"] == Finding("flash-attn", "2.8.3, not usable: the device is cpu", "note")
    assert findings["attention=auto"].value == "takes sdpa for bf16 on cpu"


def test_a_gpu_that_fails(monkeypatch):
    fake_gpu(monkeypatch)

    def fail(index: int):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronous")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    findings = found()
    assert findings["GPU 1"].value == "failed: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    assert problems(findings) == ["GPU 0", "GPU 1"]


def test_nf4_that_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "nf4_error", lambda device: float("nan"))
    assert problems(found()) == ["4-bit base"]


def test_a_driver_that_a_cpu_build_of_torch_ignores(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: True)
    findings = found()
    assert problems(findings) == ["torch"]
    assert "a CPU build on a machine with an NVIDIA driver" in findings["torch"].value


@pytest.mark.parametrize(("hidden", "hint"), [(True, "unset CUDA_VISIBLE_DEVICES"), (False, "update the NVIDIA driver")])
def test_a_driver_that_a_cuda_build_cannot_use(monkeypatch, hidden, hint):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = found()
    assert problems(findings) == ["GPU"]
    assert findings["GPU"].hint.startswith(hint)


@pytest.mark.parametrize(("free", "state"), [(doctor.FEW_BYTES, "ok"), (doctor.FEW_BYTES - 1, "note"), (GIB - 1, "problem")])
def test_little_disk(monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert found()["disk"].state == state


def test_memory_limit_of_a_container(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert found()["CPU memory"].value.endswith("this container may use 0.5 GiB")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert found()["CPU memory"].hint == "pip install psutil"


def test_lines(monkeypatch, capsys, caplog):
    versions(monkeypatch, peft="0.1")
    with caplog.at_level(logging.INFO, "hydra_ppo"):
        assert doctor.doctor() == 1
        assert caplog.messages == []  # resolve_attention logs its choice
        out, err = capsys.readouterr()
        assert err == ""
        logging.getLogger("hydra_ppo").info("heard again")
    assert caplog.messages == ["heard again"]
    lines = out.splitlines()
    assert lines[-1] == "12 ok, 2 note, 1 problem"
    (row,) = [i for i, line in enumerate(lines) if line.startswith("problem")]
    assert lines[row].split() == ["problem", "peft", "0.1", "is", "older", "than", "0.13"]
    assert lines[row + 1].strip() == "-> pip install --upgrade 'peft>=0.13'"
    assert lines[row + 1].index("->") == lines[row].index("0.1")


def test_json(monkeypatch):
    findings = [Finding("disk", "73.0 GiB [free]"), Finding("torch", "not installed", "problem", "pip install torch")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    out = io.StringIO()
    console = Console(file=out, width=20)  # narrower than the lines, which stay whole all the same
    assert doctor.doctor(console, as_json=True) == 1
    assert json.loads(out.getvalue()) == {
        "ok": False,
        "findings": [
            {"name": "disk", "value": "73.0 GiB [free]", "state": "ok", "hint": None},
            {"name": "torch", "value": "not installed", "state": "problem", "hint": "pip install torch"},
        ],
    }
    monkeypatch.setattr(doctor, "examine", lambda: findings[:1])
    assert doctor.doctor(console) == 0
    assert "73.0 GiB [free]" in out.getvalue()
