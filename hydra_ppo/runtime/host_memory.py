"""Keeps what the C library is given back, so that a run on a CPU does not pay for the same pages at every pass.

glibc hands free memory at the end of its heap back to the system, which zeroes every page before it hands it out again. A
step of training frees and asks for the same gigabytes over and over: that took as long as its arithmetic (hidden size 256,
vocabulary 32000: 300 000 pages a step, updates of 390 us a token and not 210). GPUs have torch's caching allocator, which
does there what this does here.
"""

from __future__ import annotations

import ctypes
import os
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt(3): free bytes at the heap's end above which they are given back; bytes of a block that gets a mapping of its own."""

NEVER = -1

MAPPED = 32 * 2**20
"""Where glibc itself arrives on 64-bit systems while it sees larger and larger blocks. Larger ones would leave holes in the
heap that nothing fits into: ten times a block of 40 MiB, one after the other, left 440 MiB behind."""

OWN_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory(device: torch.device) -> bool:
    """Let the process keep freed memory from now on, where models run on the CPU with glibc; return whether it does.

    A user's own choice stands: where `GLIBC_TUNABLES` or one of glibc's variables for this is set, nothing is done.

    Memory: resident memory stays at the highest that it was. Live tensors are the same; blocks of `MAPPED` bytes and more are
    still given back.
    """
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in OWN_CHOICES)
    if chosen or device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED) and mallopt(M_TRIM_THRESHOLD, NEVER))
