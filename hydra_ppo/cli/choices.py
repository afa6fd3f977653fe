"""What options of commands may be, known without torch."""

from __future__ import annotations

from typing import Literal, get_args

ExportedRole = Literal["actor", "actor_ema", "reward", "critic"]
EXPORTED_ROLES: tuple[ExportedRole, ...] = get_args(ExportedRole)
EXPORTED_TYPES = ("auto", "fp32", "bf16", "fp16")

Quantization = Literal["int8", "nf4", "fp4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
