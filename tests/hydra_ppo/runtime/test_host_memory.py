"""Freed memory is kept: page faults of the same allocation, again and again, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from hydra_ppo.runtime.host_memory import keep_freed_memory

BLOCKS, BYTES, TIMES = 8, 20 * 2**20, 10
"""160 MiB in blocks that have no mapping of their own: more than glibc would leave free at the end of its heap."""

PAGES = BLOCKS * BYTES // 4096

PROGRAM = f"""
import ctypes, resource, sys, torch
from hydra_ppo.runtime.host_memory import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
kept = keep_freed_memory(torch.device(sys.argv[1]))
def fill():
    blocks = [library.malloc({BYTES}) for _ in range({BLOCKS})]
    for block in blocks:
        ctypes.memset(block, 1, {BYTES})
    for block in blocks:
        library.free(block)
for _ in range(3):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(device: str = "cpu", **variables: str) -> tuple[bool, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, device]
    shown = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True).stdout.split()
    return shown[0] == "True", int(shown[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_block_that_was_freed_costs_no_pages():
    kept, count = faults()
    assert kept
    assert count < PAGES  # once, and not each of TIMES times
    kept, count = faults("meta")  # stands for every device that is not the CPU
    assert not kept
    assert count > TIMES * PAGES / 2


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
    ],
)
def test_a_choice_of_the_user_stands(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory(torch.device("cpu"))


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory(torch.device("cpu"))
