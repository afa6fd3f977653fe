"""The tests that only a GPU can run, as a part of the validation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra_ppo.profiling.validate.parts import NotRun

TESTS = Path("tests/gpu")


def check_tests(seconds: float) -> dict[str, Any]:
    """Run them in a process of their own, which ends with the seconds.

    Returns:
        What pytest counted, and the names of those that failed.

    Raises:
        NotRun: where this is no checkout, or pytest is not there.
    """
    import torch

    if not torch.cuda.is_available():
        raise NotRun("they need a CUDA device, and torch sees none here.")
    if not TESTS.is_dir():
        raise NotRun(f"{TESTS} is not here; run this from the root of a checkout.")
    command = [sys.executable, "-m", "pytest", str(TESTS), "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "-rfE"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not done in {seconds:.0f} s"}
    if "No module named pytest" in done.stderr:
        raise NotRun("pytest is not installed here.")
    lines = done.stdout.strip().splitlines()
    counted = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|errors?)\b", line)]
    last = re.sub(r"^=+ | =+$", "", counted[-1]) if counted else (done.stdout + done.stderr).strip()[-200:]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"counts": last, "failed": failed, "passed": done.returncode == 0, "summary": last}
